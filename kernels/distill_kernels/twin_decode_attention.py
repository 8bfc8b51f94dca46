"""Attention of a decode step in PyTorch: what `triton_decode_attention` does for CUDA, for tensors on a CPU.

Prompts next to one another go together: all rows of a prompt, times the grouped heads, are the rows of one product with
its keys. What they find is one more key of the rows' own softmax, whose logit is their log-sum-exp; a sink is another.
What depends on where rows begin and end is worked out once and kept, as all layers of a step ask for the same.
"""

import functools
import itertools
import math
from typing import NamedTuple

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


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    prompt_keys: Tensor | None,
    prompt_values: Tensor | None,
    row_start: Tensor | None,
    rows_a_prompt: int,
    left_padding: Tensor | None,
    ended: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Writes the contiguous out [R, Hq, Dv]; see `decode_attention`. The query and `out` may be of any dtype."""
    end = int(position) + 1
    first = 0
    if window is not None:
        first = max(0, end - window + (0 if prompt_keys is None else prompt_keys.shape[2]))
    call = Call(
        query.to(torch.promote_types(keys.dtype, torch.float32)) * scale,
        keys,
        values,
        out,
        prompt_keys,
        prompt_values,
        None if left_padding is None else left_padding.tolist(),
        first,
        min(end, keys.shape[2]),
        softcap,
        sinks,
    )
    bounds = None if row_start is None else tuple(row_start.tolist())
    flags = None if ended is None else tuple(ended.tolist())
    for run in _runs(len(query), bounds, flags):
        if _attend(call, run):
            continue
        # What must not count was not finite: each prompt, or row, by itself, whose padding is cut off.
        for single in _singles(run, bounds):
            _attend(call, single)
    if flags is not None and True in flags:
        out.masked_fill_(ended[:, None, None], 0)


def _attend(call: Call, run: Run) -> bool:
    """Writes a run's rows; false where padding that is masked, and not cut off, may have spoilt them."""
    query, keys, values, out = (_cut(each, run.rows) for each in (call.query, call.keys, call.values, call.out))
    R, Hkv, Dv = len(query), keys.shape[1], values.shape[3]
    query = query.view(R, Hkv, -1, query.shape[2])  # [R, Hkv, g, D]
    first, bias, prompt = call.first, None, None
    if call.padding is not None:
        padding = call.padding[run.rows if run.prompts is None else run.prompts]
        slots = (keys if run.prompts is None else call.prompt_keys).shape[2]
        first = max(first, min(padding))
        if max(padding) == slots > first:
            return False  # a softmax of nothing
        if max(padding) > first:
            bias = _bias(tuple(padding), slots, query.dtype)[..., first:]
    if run.prompts is not None:
        P = call.prompt_keys.shape[2]
        if first < P:
            held = (_cut(each, run.prompts)[:, :, first:] for each in (call.prompt_keys, call.prompt_values))
            prompt = _attend_prompts(query, *held, bias, run, call.softcap)
        first = max(0, first - P)
    keys, values = (each.narrow(2, first, call.end - first).to(query.dtype).flatten(0, 1) for each in (keys, values))
    scores = _capped(torch.bmm(query.flatten(0, 1), keys.mT), call.softcap).view(R, Hkv, -1, call.end - first)
    if bias is not None and run.prompts is None:
        scores += bias[..., : call.end - first]
    extra = [] if prompt is None else [prompt[1].unsqueeze(-1)]
    if call.sinks is not None:
        extra.append(call.sinks.to(scores.dtype).view(1, Hkv, -1, 1).expand(R, -1, -1, -1))
    weights = (torch.cat([scores, *extra], -1) if extra else scores).softmax(-1)
    of_own = weights.flatten(0, 1)[..., : scores.shape[-1]]
    result = torch.bmm(of_own, values).view(R, Hkv, -1, Dv)
    written = out.view(result.shape)
    if prompt is None:
        written.copy_(result)
    elif out.dtype == result.dtype:
        torch.addcmul(result, weights.narrow(-1, scores.shape[-1], 1), prompt[0], out=written)
    else:
        written.copy_(result.addcmul_(weights.narrow(-1, scores.shape[-1], 1), prompt[0]))
    return bias is None or math.isfinite(out.sum(dtype=result.dtype))


def _attend_prompts(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, run: Run, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """A run's rows [R, Hkv, g, D] on their prompts' keys: [R, Hkv, g, Dv] and log-sum-exps [R, Hkv, g]."""
    B, (_, Hkv, g, D) = len(keys), query.shape
    if run.row_of_slot is not None:
        query = query.index_select(0, run.row_of_slot)
    query = query.view(B, -1, Hkv, g, D).transpose(1, 2).reshape(B, Hkv, -1, D)
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    if softcap is None and values.shape[3] == D:
        mask = None if bias is None else bias.expand(B, Hkv, query.shape[2], -1)
        flash = torch._scaled_dot_product_flash_attention_for_cpu
        found = flash(query, keys, values, 0.0, False, attn_mask=mask, scale=1.0)
    else:
        scores = _capped(query @ keys.mT, softcap)
        if bias is not None:
            scores += bias
        lse = scores.logsumexp(-1, keepdim=True)
        found = scores.sub_(lse).exp_() @ values, lse.squeeze(-1)
    return tuple(_rows_of(each, g, run.slot_of_row) for each in found)


def _rows_of(of_slots: Tensor, g: int, slot_of_row: Tensor | None) -> Tensor:
    """[B, Hkv, rows a prompt * g, ..] to [R, Hkv, g, ..]."""
    of_slots = of_slots.transpose(1, 2).unflatten(1, (-1, g)).flatten(0, 1)
    return (of_slots if slot_of_row is None else of_slots.index_select(0, slot_of_row)).transpose(1, 2)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _cut(tensor: Tensor, part: slice) -> Tensor:
    return tensor if part.stop - part.start == len(tensor) else tensor[part]


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


def _singles(run: Run, bounds: tuple[int, ...] | None) -> list[Run]:
    if run.prompts is None:
        return [Run(slice(row, row + 1), None) for row in range(run.rows.start, run.rows.stop)]
    return [_run_of(bounds, prompt, prompt + 1) for prompt in range(run.prompts.start, run.prompts.stop)]
