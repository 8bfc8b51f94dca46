"""`decode_attention`: one new token a row attends to its prompt's keys, stored once a prompt, and to its own.

For row r of prompt b, with softmax and sums in float32 and scores that are never rounded to half precision:

    out[r, h] = softmax(scale * query[r, h] K^T) V,   K = prompt_keys[b, h / g] after its padding,
                                                      then keys[r, h / g] up to `position`

through a window, with capped scores and with a sink in the softmax where a model has them. A step's new keys and values
may come apart from the buffers, and are then written there too, which saves two launches. On CUDA nothing is read back
and every shape is fixed, so that a captured graph follows `position`, `row_start` and `ended`.

Bytes: Hkv (D + Dv) w for each prompt's P keys (times the pieces a prompt's rows are cut into, which the L2 cache holds)
and for each living row's position + 1 keys, or as many as are in the window. Left out on purpose: gradients.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distill_kernels import backend, checks

LARGEST_HEAD = 256


@torch.library.custom_op("distill_kernels::decode_attention", mutates_args=("keys", "values"))
def _decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
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
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
) -> Tensor:
    out = query.new_empty(*query.shape[:2], values.shape[3])
    of_prompts = prompt_keys, prompt_values, row_start, rows_a_prompt, left_padding
    others = *of_prompts, ended, scale, window, softcap, sinks, new_keys, new_values
    options = dict(zip(OPTIONS, others, strict=True))
    backend.implementation("decode_attention", query.device).attend(query, keys, values, position, out, **options)
    return out


# The op's arguments after the first four, as implementations call them.
OPTIONS = (
    "prompt_keys", "prompt_values", "row_start", "rows_a_prompt", "left_padding", "ended", "scale", "window", "softcap",
    "sinks", "new_keys", "new_values",
)  # fmt: skip


def _repeated(outputs, query, keys, values, position, *others) -> Callable[[], None]:
    implementation = backend.implementation("decode_attention", query.device)
    call = query, keys, values, position, *outputs
    options = dict(zip(OPTIONS, others, strict=False))  # of which the last may be left out
    if hasattr(implementation, "repeated"):
        return implementation.repeated(*call, **options)
    return partial(implementation.attend, *call, **options)


backend.REPEATED["distill_kernels::decode_attention"] = _repeated


@_decode_attention.register_fake
def _(query, keys, values, *_, **__) -> Tensor:
    return query.new_empty(*query.shape[:2], values.shape[3])


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    scale: float,
    prompt_keys: Tensor | None = None,
    prompt_values: Tensor | None = None,
    row_start: Tensor | None = None,
    rows_a_prompt: int | None = None,
    left_padding: Tensor | None = None,
    ended: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
) -> Tensor:
    """Attention of query [R, Hq, D] on keys [R, Hkv, T, D] and values [R, Hkv, T, Dv], to [R, Hq, Dv].

    Of a row's T slots, 0 to `position` ([1] int64, below T) count. With `prompt_keys` [B, Hkv, P, D] and
    `prompt_values` [B, Hkv, P, Dv], the rows `row_start[b]` to `row_start[b + 1]` ([B + 1] int64, from 0 on, in order)
    also see those of prompt b. `rows_a_prompt` says how many rows a prompt has at most (R if absent; with fewer than
    there are, the output is wrong). `left_padding` (int64; [B], or [R] without prompts) counts the first keys that are
    none; no row may be padding alone.

    Rows that have `ended` ([R] bool) give 0. Buffers may be larger than a batch: prompts without rows cost nothing, and
    rows from `row_start[B]` on belong to no prompt and must be marked in `ended`. What does not count (padding, slots
    past `position`, rows that have ended, prompts of which all have) may hold anything, NaN too. On CUDA it is not
    read; on a CPU prompts without a living row are not, nor their rows, nor rows before the first or after the last
    living one where there are no prompts.

    A token sees itself and the `window` - 1 tokens before it; row r's stands at slot P + `position`, prompts first.
    `softcap` bounds the scaled scores: softcap * tanh(score / softcap). `sinks` [Hq] are logits that take part in the
    softmax, and nothing of the output.

    `new_keys` [R, Hkv, D] and `new_values` [R, Hkv, Dv] are those of slot `position`, which they are written to: what
    it held counts for nothing, and nothing else is written. On CUDA rows that have ended are not.

    All dtypes but the sinks' are one; D and Dv are at most LARGEST_HEAD on CUDA; the last stride must be 1, the others
    are free. No gradients.

    Raises ValueError for a wrong shape, dtype, stride, device or number.
    """
    R = query.shape[0]
    _check(query, keys, values, prompt_keys, prompt_values)
    _check_vectors(query, _prompts(prompt_keys), position, row_start, left_padding, ended)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the token itself; found {window}")
    checks.check_positive("softcap", softcap)
    checks.check_floats(query=query, sinks=sinks)
    checks.check_vector("sinks", sinks, query.shape[1], f"query {list(query.shape)}")
    _check_new(query, values, keys.shape[1], new_keys, new_values)
    rows_a_prompt = R if rows_a_prompt is None else rows_a_prompt
    optional = (prompt_keys, prompt_values, row_start, rows_a_prompt, left_padding, ended)
    others = scale, window, softcap, sinks, new_keys, new_values
    return _decode_attention(query, keys, values, position, *optional, *others)


def _check(
    query: Tensor, keys: Tensor, values: Tensor, prompt_keys: Tensor | None, prompt_values: Tensor | None
) -> None:
    pairs = {"keys": keys, "values": values, "prompt_keys": prompt_keys, "prompt_values": prompt_values}
    checks.check_floats(query=query, **pairs)
    if query.dim() != 3 or keys.dim() != 4:
        raise ValueError(f"query must be [R, Hq, D] and keys [R, Hkv, T, D]; found {_found(query)} and {_found(keys)}")
    (R, Hq, D), Hkv = query.shape, keys.shape[1]
    widest = LARGEST_HEAD if backend.runs_triton(query.device) else max(D, values.shape[-1])
    if keys.shape[0] != R or keys.shape[3] != D or Hq % Hkv or not 0 < D <= widest:
        raise ValueError(
            f"query [R, Hq, D] and keys [R, Hkv, T, D] must agree in R and D, Hq be a multiple of Hkv and D at most "
            f"{widest}; found {_found(query)} and {_found(keys)}"
        )
    if values.dim() != 4 or not 0 < values.shape[3] <= widest:
        raise ValueError(f"values must be [R, Hkv, T, Dv], Dv at most {widest}; found {_found(values)}")
    if (prompt_keys is None) != (prompt_values is None):
        raise ValueError("prompt_keys and prompt_values come together; found one without the other")
    for name, tensor in pairs.items():
        if tensor is None:
            continue
        of_keys, width = (prompt_keys if "prompt" in name else keys), (D if "keys" in name else values.shape[3])
        expected = (*of_keys.shape[:1], Hkv, *of_keys.shape[2:3], width)
        if tensor.shape != expected or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} must be {query.dtype} [{'B' if 'prompt' in name else R}, {Hkv}, slots, {width}], keys and "
                f"values alike; found {_found(tensor)}"
            )
    for name, tensor in {"query": query, **pairs}.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name}'s last stride must be 1; found strides {list(tensor.stride())}")


def _check_new(query: Tensor, values: Tensor, Hkv: int, new_keys: Tensor | None, new_values: Tensor | None) -> None:
    if (new_keys is None) != (new_values is None):
        raise ValueError("new_keys and new_values come together; found one without the other")
    if new_keys is None:
        return
    checks.check_floats(query=query, new_keys=new_keys, new_values=new_values)
    for name, tensor, width in (("new_keys", new_keys, query.shape[2]), ("new_values", new_values, values.shape[3])):
        expected = (query.shape[0], Hkv, width)
        if tensor.shape != expected or tensor.dtype != query.dtype:
            raise ValueError(f"{name} must be {query.dtype} {list(expected)}; found {_found(tensor)}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}'s last stride must be 1; found strides {list(tensor.stride())}")


def _check_vectors(
    query: Tensor,
    prompts: int | None,
    position: Tensor,
    row_start: Tensor | None,
    left_padding: Tensor | None,
    ended: Tensor | None,
) -> None:
    R, device = query.shape[0], query.device
    if (row_start is None) != (prompts is None):
        raise ValueError("row_start comes with prompt_keys and prompt_values; found one without the other")
    _check_integers("position", position, 1, device)
    if prompts is not None:
        _check_integers("row_start", row_start, prompts + 1, device)
    _check_integers("left_padding", left_padding, R if prompts is None else prompts, device)
    if ended is not None and (ended.dtype != torch.bool or ended.shape != (R,) or ended.device != device):
        raise ValueError(f"ended must be [{R}] bool on {device}; found {_found(ended)} on {ended.device}")


def _check_integers(name: str, vector: Tensor | None, length: int, device: torch.device) -> None:
    if vector is not None:
        checks.check_vector(name, vector, length, "the other tensors")
        checks.check_integers(name, vector, device)


def _prompts(prompt_keys: Tensor | None) -> int | None:
    return None if prompt_keys is None else prompt_keys.shape[0]


def _found(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
