"""Attention of a decode step in PyTorch: what `triton_decode_attention` does for CUDA, for tensors on a CPU.

Prompts next to one another go together: all rows of a prompt, times the grouped heads, are the rows of one product with
its keys. What they find is one more key of the rows' own softmax, whose logit is their log-sum-exp; a sink is another.
What depends on where rows begin and end is worked out once and kept, as all layers of a step ask for the same.
"""

import functools
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Rows that are attended together. A slot is where a row stands in [prompts, rows of the longest]."""

    rows: slice
    prompts: slice | None
    row_of_slot: Tensor | None = None
    """[slots] int64, any row where there is none; None where all prompts have as many rows: slots are rows."""
    slot_of_row: Tensor | None = None


class Call(NamedTuple):
    """The arguments of all runs; see `decode_attention`."""

    query: Tensor
    """Scaled, in the dtype that sums have."""
    keys: Tensor
    values: Tensor
    out: Tensor
    prompt_keys: Tensor | None
    prompt_values: Tensor | None
    padding: list[int] | None
    first: int
    """The first slot in the window, counted from the prompts' first."""
    end: int
    """Own slots that are filled."""
    softcap: float | None
    sinks: Tensor | None


class Where(NamedTuple):
    """What a step's rows see, read from its tensors once for all layers."""

    end: int
    padding: list[int] | None
    bounds: tuple[int, ...] | None
    runs: list[Run]
    ended: tuple[bool, ...] | None


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    row_start: Tensor | None,
    left_padding: Tensor | None,
    ended: Tensor | None,
    **options: Any,
) -> None:
    """Writes the contiguous out [R, Hq, Dv], and new keys and values; see `decode_attention`.

    The query and `out` may be of any dtype.
    """
    where = _read(query.shape[0], position, row_start, left_padding, ended)
    _attend_where(where, query, keys, values, out, ended, **options)


def repeated(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, out: Tensor, **options: Any) -> Callable:
    """A call of `attend` that is made again for the same tensors: layers of one step share what they read from them."""
    said = [options.pop(name) for name in ("row_start", "left_padding", "ended")]
    told, ended = [tensor for tensor in (position, *said) if tensor is not None], said[-1]

    def again() -> None:
        key = [(id(tensor), tensor._version) for tensor in told]
        if _last.key != key:
            _last.key, _last.told, _last.where = key, told, _read(query.shape[0], position, *said)
        _attend_where(_last.where, query, keys, values, out, ended, **options)

    return again


# Of the last call that was repeated; the tensors are held, so that none of another has their place.
_last = SimpleNamespace(key=None, told=None, where=None)


def _read(
    R: int, position: Tensor, row_start: Tensor | None, left_padding: Tensor | None, ended: Tensor | None
) -> Where:
    padding = None if left_padding is None else left_padding.tolist()
    bounds = None if row_start is None else tuple(row_start.tolist())
    flags = None if ended is None else tuple(ended.tolist())
    return Where(int(position) + 1, padding, bounds, _runs(R, bounds, flags), flags)


def _attend_where(
    where: Where,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    ended: Tensor | None,
    *,
    prompt_keys: Tensor | None,
    prompt_values: Tensor | None,
    rows_a_prompt: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
) -> None:
    if new_keys is not None:
        keys.select(2, where.end - 1).copy_(new_keys)
        values.select(2, where.end - 1).copy_(new_values)
    end, dtype = where.end, torch.promote_types(keys.dtype, torch.float32)
    first = 0
    if window is not None:
        first = max(0, end - window + (0 if prompt_keys is None else prompt_keys.shape[2]))
    query = (query if query.dtype == dtype else query.to(dtype)) * scale
    end = min(end, keys.shape[2])
    call = Call(query, keys, values, out, prompt_keys, prompt_values, where.padding, first, end, softcap, sinks)
    for run in where.runs:
        if _attend(call, run):
            continue
        # What must not count was not finite: each prompt, or row, by itself, whose padding is cut off.
        for single in _singles(run, where.bounds, where.ended):
            _attend(call, single)
    if where.ended is not None and True in where.ended:
        out.masked_fill_(ended[:, None, None], 0)


def _attend(call: Call, run: Run) -> bool:
    """Writes a run's rows; false where padding that is masked, and not cut off, may have spoilt them."""
    query, keys, values, out, prompt_keys, _, padding, first, end, softcap, sinks = call
    if run.rows.stop - run.rows.start < query.shape[0]:
        query, keys, values, out = query[run.rows], keys[run.rows], values[run.rows], out[run.rows]
    (R, Hq, D), Hkv, Dv, P = query.shape, keys.shape[1], values.shape[3], 0
    bias = prompt = None
    if run.prompts is not None:
        P = prompt_keys.shape[2]
    if padding is not None:
        padding, slots = padding[run.prompts or run.rows], P or keys.shape[2]
        longest, first = max(padding), max(first, min(padding))
        if longest == slots > first:
            return False  # a softmax of nothing
        if longest > first:
            bias = _bias(tuple(padding), slots, query.dtype)[..., first:]
    if first < P:
        prompt = _attend_prompts(call, run, query, first, bias)
    own = max(0, first - P)
    shape = R * Hkv, Hq // Hkv, -1
    scores = torch.bmm(query.reshape(R * Hkv, Hq // Hkv, D), _heads(keys, own, end, query.dtype).mT)
    scores = _capped(scores, softcap).view(R, Hkv, Hq // Hkv, end - own)
    if bias is not None and not P:
        scores += bias[..., : end - own]
    extra = () if prompt is None else prompt[1:]
    if sinks is not None:
        extra = *extra, sinks.to(scores.dtype).view(1, Hkv, -1, 1).expand(R, -1, -1, -1)
    weights = (torch.cat((scores, *extra), -1) if extra else scores).softmax(-1)
    of_own = weights.view(shape)
    if extra:
        of_own = of_own.narrow(-1, 0, end - own)
    result = torch.bmm(of_own, _heads(values, own, end, query.dtype)).view(R, Hkv, Hq // Hkv, Dv)
    written = out.view(R, Hkv, Hq // Hkv, Dv)
    if prompt is None:
        written.copy_(result)
    elif out.dtype == result.dtype:
        torch.addcmul(result, weights.narrow(-1, end - own, 1), prompt[0], out=written)
    else:
        written.copy_(result.addcmul_(weights.narrow(-1, end - own, 1), prompt[0]))
    return bias is None or math.isfinite(out.sum(dtype=result.dtype))


def _heads(tensor: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """The slots `begin` to `end` of [R, Hkv, T, ..], as [R * Hkv, slots, ..]."""
    tensor = tensor.narrow(2, begin, end - begin).flatten(0, 1)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _attend_prompts(call: Call, run: Run, query: Tensor, first: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A run's rows [R, Hq, D] on their prompts' keys: [R, Hkv, g, Dv] and log-sum-exps [R, Hkv, g, 1]."""
    keys, values, softcap = call.prompt_keys, call.prompt_values, call.softcap
    if run.prompts.stop - run.prompts.start < keys.shape[0]:
        keys, values = keys[run.prompts], values[run.prompts]
    if first:
        keys, values = keys[:, :, first:], values[:, :, first:]
    if keys.dtype != query.dtype:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    if run.row_of_slot is not None:
        query = query.index_select(0, run.row_of_slot)
    (slots, Hq, D), (B, Hkv, _, Dv) = query.shape, values.shape
    g = Hq // Hkv
    query = query.view(B, -1, Hkv, g, D).transpose(1, 2).reshape(B, Hkv, -1, D)
    if softcap is None and Dv == D:
        mask = None if bias is None else bias.expand(B, Hkv, query.shape[2], -1)
        flash = torch._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(query, keys, values, 0.0, False, attn_mask=mask, scale=1.0)
    else:
        scores = _capped(query @ keys.mT, softcap)
        if bias is not None:
            scores += bias
        lse = scores.logsumexp(-1, keepdim=True)
        out = scores.sub_(lse).exp_() @ values
    # From [B, Hkv, rows a prompt * g, ..].
    out, lse = out.transpose(1, 2).reshape(slots, g, Hkv, Dv), lse.transpose(1, 2).reshape(slots, g, Hkv, 1)
    if run.slot_of_row is not None:
        out, lse = out.index_select(0, run.slot_of_row), lse.index_select(0, run.slot_of_row)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


@functools.lru_cache(maxsize=8)
def _bias(padding: tuple[int, ...], slots: int, dtype: torch.dtype) -> Tensor:
    """[holders, 1, 1, slots], -inf for a padded slot."""
    padded = torch.arange(slots) < torch.tensor(padding)[:, None]
    return torch.zeros(len(padding), 1, 1, slots, dtype=dtype).masked_fill_(padded[:, None, None], -math.inf)


@functools.lru_cache(maxsize=64)
def _runs(R: int, bounds: tuple[int, ...] | None, ended: tuple[bool, ...] | None) -> list[Run]:
    """Prompts next to one another that have a living row; without prompts, from the first living row to the last."""
    alive = [row for row in range(R) if ended is None or not ended[row]]
    if bounds is None:
        return [Run(slice(alive[0], alive[-1] + 1), None)] if alive else []
    living = set(alive)
    has_rows = [not living.isdisjoint(range(*pair)) for pair in itertools.pairwise(bounds)]
    runs, begin = [], 0
    for lives, prompts in itertools.groupby(has_rows):
        end = begin + len(list(prompts))
        if lives:
            runs.append(_run_of(bounds, begin, end))
        begin = end
    return runs


def _run_of(bounds: tuple[int, ...], begin: int, end: int) -> Run:
    """The prompts `begin` to `end`."""
    rows, prompts = slice(bounds[begin], bounds[end]), slice(begin, end)
    counts = [right - left for left, right in itertools.pairwise(bounds[begin : end + 1])]
    width = max(counts)
    if min(counts) == width:
        return Run(rows, prompts)
    slot_of_row = torch.tensor([prompt * width + rank for prompt, n in enumerate(counts) for rank in range(n)])
    row_of_slot = torch.zeros(len(counts) * width, dtype=torch.int64)
    row_of_slot[slot_of_row] = torch.arange(len(slot_of_row))
    return Run(rows, prompts, row_of_slot, slot_of_row)


def _singles(run: Run, bounds: tuple[int, ...] | None, ended: tuple[bool, ...] | None) -> list[Run]:
    if run.prompts is None:
        rows = range(run.rows.start, run.rows.stop)
        return [Run(slice(row, row + 1), None) for row in rows if ended is None or not ended[row]]
    return [_run_of(bounds, prompt, prompt + 1) for prompt in range(run.prompts.start, run.prompts.stop)]
