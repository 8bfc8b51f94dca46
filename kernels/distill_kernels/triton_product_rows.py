"""What follows the student's product, row by row: statistics, losses and factors from its partial sums, then E made the
gradient in place. The names are those of `triton_student_product`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_math import FUSION

REF_S, REF_T, OWN, TOP, SUM = (tl.constexpr(row) for row in range(5))
"""Rows of `Scratch.per_row`: both models' logits of the token; the student's as the product has it, less that; then
of the row the largest k, and relative to it the sum of E."""


class Scratch(NamedTuple):
    """Of a chunk's rows, about a fiftieth of its buffers: what passes from kernel to kernel, in float32."""

    per_row: Tensor
    """[5, rows]"""
    part: Tensor
    """[7, T, rows]: sum E, sum 2^y, sum E x, sum 2^y y, sum E (x - y), all with x less k and y less k_t, then k and
    k_t, of T tiles of columns."""


def scratch(rows: int, V: int, columns: int, device: torch.device) -> Scratch:
    """For chunks of at most `rows` rows and tiles of `columns` columns."""
    shapes = (5, rows), (7, triton.cdiv(V, columns), rows)
    return Scratch(*(torch.empty(shape, device=device) for shape in shapes))


@triton.jit
def _over_tiles(part, rows, tiles, start, R, row_stride, TILES: tl.constexpr):
    """Where the partial sums of TILES tiles and these rows begin, and whether they exist."""
    tile = start + tl.arange(0, TILES)
    at = part + tl.cast(tile, tl.int64)[:, None] * row_stride + rows[None, :]
    return at, (tile < tiles)[:, None] & (rows < R)[None, :]


@triton.jit
def _totals(part, rows, tiles, R, row_stride, ROWS: tl.constexpr, TILES: tl.constexpr):
    """The largest k and k_t of these rows, and their five sums relative to these."""
    step = tl.cast(tiles, tl.int64) * row_stride
    tops_s = tl.zeros([TILES, ROWS], tl.float32)
    tops_t = tl.zeros([TILES, ROWS], tl.float32)
    for start in range(0, tiles, TILES):
        at, exists = _over_tiles(part, rows, tiles, start, R, row_stride, TILES)
        tops_s = tl.maximum(tops_s, tl.load(at + 5 * step, mask=exists, other=0.0))
        tops_t = tl.maximum(tops_t, tl.load(at + 6 * step, mask=exists, other=0.0))
    top_s = tl.max(tops_s, 0)
    top_t = tl.max(tops_t, 0)
    sums_s = tl.zeros([TILES, ROWS], tl.float32)
    sums_t = tl.zeros([TILES, ROWS], tl.float32)
    owns_s = tl.zeros([TILES, ROWS], tl.float32)
    owns_t = tl.zeros([TILES, ROWS], tl.float32)
    crosses = tl.zeros([TILES, ROWS], tl.float32)
    for start in range(0, tiles, TILES):
        at, exists = _over_tiles(part, rows, tiles, start, R, row_stride, TILES)
        below_s = tl.load(at + 5 * step, mask=exists, other=0.0) - top_s[None, :]
        below_t = tl.load(at + 6 * step, mask=exists, other=0.0) - top_t[None, :]
        of_s = tl.load(at, mask=exists, other=0.0)
        of_t = tl.load(at + step, mask=exists, other=0.0)
        sums_s += of_s * tl.exp2(below_s)
        sums_t += of_t * tl.exp2(below_t)
        owns_s += (tl.load(at + 2 * step, mask=exists, other=0.0) + of_s * below_s) * tl.exp2(below_s)
        owns_t += (tl.load(at + 3 * step, mask=exists, other=0.0) + of_t * below_t) * tl.exp2(below_t)
        crosses += (tl.load(at + 4 * step, mask=exists, other=0.0) + of_s * (below_s - below_t)) * tl.exp2(below_s)
    sum_s = tl.sum(sums_s, 0)
    sum_t = tl.sum(sums_t, 0)
    return top_s, top_t, sum_s, sum_t, tl.sum(owns_s, 0), tl.sum(owns_t, 0), tl.sum(crosses, 0)


@triton.jit(
    do_not_specialize=["R", "row_stride", "stats_stride"],
    do_not_specialize_on_alignment=[
        "at_sampling_ptr", "advantage_ptr", "stats", "losses", "row_scale", "part", "per_row"
    ],
)  # fmt: skip
def _finish_kernel(
    part, per_row, at_sampling_ptr, advantage_ptr, stats, losses, row_scale, R, tiles, row_stride, stats_stride,
    importance_clip, IMPORTANCE: tl.constexpr, ADVANTAGE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Statistics, losses and row factors of ROWS rows from the partial sums, and what the gradient still needs."""
    LN_2: tl.constexpr = 0.6931471805599453
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < R
    top_s, top_t, sum_s, sum_t, own_s, own_t, cross = _totals(part, rows, tiles, R, row_stride, ROWS, TILES)
    log_s = tl.log2(sum_s)  # of the normalisers, less the token's own logit and the largest k
    log_t = tl.log2(sum_t)
    own = tl.load(per_row + OWN * row_stride + rows, mask=inside, other=0.0)
    logprob_s = (own - top_s - log_s) * LN_2
    logprob_t = (tl.where(own == own, -top_t, own) - log_t) * LN_2
    logprob_s = tl.where(logprob_s > 0, 0.0, logprob_s)
    logprob_t = tl.where(logprob_t > 0, 0.0, logprob_t)
    kl = (cross / sum_s - log_s + log_t) * LN_2
    reward = logprob_t - logprob_s
    tl.store(stats + rows, logprob_s, mask=inside)
    tl.store(stats + stats_stride + rows, logprob_t, mask=inside)
    tl.store(stats + 2 * stats_stride + rows, reward, mask=inside)
    tl.store(stats + 3 * stats_stride + rows, kl, mask=inside)
    tl.store(stats + 4 * stats_stride + rows, (log_s - own_s / sum_s) * LN_2, mask=inside)
    tl.store(stats + 5 * stats_stride + rows, (log_t - own_t / sum_t) * LN_2, mask=inside)
    ratio = 1.0
    if IMPORTANCE:
        at_sampling = tl.load(at_sampling_ptr + rows, mask=inside, other=0.0)
        ratio = tl.minimum(tl.exp(logprob_s - at_sampling), importance_clip)
    advantage = reward
    if ADVANTAGE:
        advantage = tl.load(advantage_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    factor = tl.where(ratio == 0, 0.0, ratio * advantage)
    loss = tl.where((factor == 0) | (logprob_s == 0), 0.0, -factor * logprob_s)
    infinite = (loss == float("inf")) | (loss == float("-inf"))
    tl.store(losses + rows, loss, mask=inside)
    tl.store(row_scale + rows, tl.where(infinite, 0.0, factor / sum_s), mask=inside)
    tl.store(per_row + TOP * row_stride + rows, top_s, mask=inside)
    tl.store(per_row + SUM * row_stride + rows, sum_s, mask=inside)


@triton.jit(
    do_not_specialize=["row_stride"], do_not_specialize_on_alignment=["token_ids", "per_row", "shifts", "row_scale"]
)
def _target_kernel(
    e_ptr, token_ids, per_row, shifts, row_scale, e_stride, row_stride, V, tiles,
    COLUMNS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """E of the token's column less the sum of E, in place. One program a row, which goes over all of the row, COUNT
    tiles at once, only where some tile has a k, to give every tile the same.

    The row's factor takes back how that number is rounded: times the factor it is exact, and so is one of its size."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row)
    top = tl.load(per_row + TOP * row_stride + row)
    own = tl.load(per_row + OWN * row_stride + row) - top
    target = tl.exp2(own) - tl.load(per_row + SUM * row_stride + row)
    rounded = target.to(e_ptr.dtype.element_ty).to(tl.float32)
    unrounded = tl.where(rounded == 0, 1.0, target / rounded)
    tl.store(row_scale + row, tl.load(row_scale + row) * unrounded)
    e_row = e_ptr + row * e_stride
    if top > 0:
        for start in range(0, tiles, COUNT):
            tile = start + tl.arange(0, COUNT)
            cols = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            at = shifts + tl.cast(tile, tl.int64) * row_stride + row
            shrink = tl.exp2(tl.load(at, mask=tile < tiles, other=0.0) - top)
            e = tl.load(e_row + cols, mask=cols < V, other=0.0).to(tl.float32) * shrink[:, None]
            e = tl.where(cols == token, target, e)
            tl.store(e_row + cols, e.to(e_ptr.dtype.element_ty), mask=cols < V)
    else:
        tl.store(e_row + token, target.to(e_ptr.dtype.element_ty), mask=(token >= 0) & (token < V))


def finish(
    room: Scratch,
    sampling_logprob: Tensor | None,
    advantage: Tensor | None,
    stats: Tensor,
    losses: Tensor,
    row_scale: Tensor,
    importance_clip: float | None,
) -> None:
    """Statistics [6, k], losses and row factors [k] of a chunk, as `triton_rows.distill_rows` gives them but for the
    factor, which is over the sum of E."""
    k = len(losses)
    _finish_kernel[(triton.cdiv(k, 32),)](
        room.part,
        room.per_row,
        stats if sampling_logprob is None else sampling_logprob.contiguous(),
        stats if advantage is None else advantage.contiguous(),
        stats,
        losses,
        row_scale,
        k,
        room.part.shape[1],
        room.per_row.stride(0),
        stats.stride(0),
        float("inf") if importance_clip is None else importance_clip,
        IMPORTANCE=sampling_logprob is not None,
        ADVANTAGE=advantage is not None,
        ROWS=32,
        TILES=32,
        num_warps=8,
        **FUSION,
    )


def put_target(room: Scratch, e: Tensor, token_ids: Tensor, row_scale: Tensor, columns: int) -> None:
    """Makes E [k, V] the gradient but for the row's factor, which changes with it; tiles have `columns` columns."""
    k, V = e.shape
    _target_kernel[(k,)](
        e,
        token_ids,
        room.per_row,
        room.part[5],
        row_scale,
        e.stride(0),
        room.per_row.stride(0),
        V,
        room.part.shape[1],
        COLUMNS=columns,
        COUNT=8,
        num_warps=4,
        **FUSION,
    )
