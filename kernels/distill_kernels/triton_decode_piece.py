"""What a program of `triton_decode_attention` does with its piece of the keys, as Triton functions."""

import triton
import triton.language as tl

from distill_kernels.triton_heads import load_rows, store_rows, tanh


@triton.jit
def nothing(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """What a piece begins with: the largest score, the sum of weights relative to it, and of weighted values."""
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return peak, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)


@triton.jit
def newest(
    query, new_key, new_value, key, value, here, scale_log2, cap_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Stores a new key and value where they belong, and begins a piece with them; `nothing` unless `here`.

    The other keys are read from the buffers without this slot, so that no program reads what one writes.
    """
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside, inside_v = d < tl.where(here, D, 0), dv < tl.where(here, DV, 0)
    k = tl.load(new_key + d, mask=inside, other=0.0)
    v = tl.load(new_value + dv, mask=inside_v, other=0.0)
    tl.store(key + d, k, mask=inside)
    tl.store(value + dv, v, mask=inside_v)
    score = tl.sum(query.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale_log2
    if CAP:
        score = tanh(score) * cap_log2
    peak = tl.where(here, score, float("-inf"))
    total = tl.where(here, tl.full([BLOCK_M], 1.0, tl.float32), 0.0)
    return peak, total, tl.broadcast_to(v.to(tl.float32)[None, :], [BLOCK_M, BLOCK_DV])


@triton.jit
def attend_piece(
    query, keys, values, key_stride, value_stride, first, end, peak, total, out, scale_log2, cap_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of query [BLOCK_M, BLOCK_D] over the keys first..end of one head, and its base-2 log-sum-exp.

    It goes on from `peak`, `total` and `out`. Without keys 0 and -inf. With CAP, scale_log2 is what is multiplied with
    before the tanh, cap_log2 after it.
    """
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        k = load_rows(keys, n, key_stride, inside, D, BLOCK_D)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale_log2
        if CAP:
            scores = tanh(scores) * cap_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        move = tl.exp2(peak - new)
        total = total * move + tl.sum(weights, 1)
        v = load_rows(values, n, value_stride, inside, DV, BLOCK_DV)
        out = out * move[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = new
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    return out / safe[:, None], tl.where(seen, peak + tl.log2(safe), float("-inf"))


@triton.jit
def store_piece(out, lse, pieces, piece_lse, at, there, D: tl.constexpr, BLOCK_D: tl.constexpr, ONLY: tl.constexpr):
    """Writes a piece's result at the flat (piece, row, head) `at`; the only piece has no use for its log-sum-exp."""
    store_rows(pieces, at, D, there, out, D, BLOCK_D)
    if not ONLY:
        tl.store(piece_lse + at, lse, mask=there)
