"""Drawing tokens in Triton: what `twin_sample` does for a CPU.

A race is split over programs of `RACE_BLOCK` columns, so that a few rows use the whole GPU, and each row's programs
are merged by one. How it is split depends on V alone: a row draws the same token in any batch. The search for a
filter's threshold is one program a row, which reads its row some times over.

With z = (logit - largest logit) / temperature, so that the largest is 0 and e^z its mass.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels import counter
from distill_kernels.triton_math import FUSION, offset_of

BLOCK = 4096  # columns that the search for a threshold holds at once; tests make both smaller
WARPS = 16
RACE_BLOCK = 4096  # columns of one program of the race
RACE_WARPS = 8
MERGE_WARPS = 1

_SPREAD = tl.constexpr(counter.SPREAD)
_MIX = tl.constexpr(counter.MIX)
_WORD = tl.constexpr(counter.WORD)
_LARGEST = tl.constexpr(counter.LARGEST)


@triton.jit
def _load(row, column_step, cols, V):
    """Logits of the columns `cols`, -inf past the last column."""
    return tl.load(row + offset_of(cols, column_step), mask=cols < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _row_range(row, column_step, V, inverse_temperature, BLOCK: tl.constexpr):
    """One read: the largest logit m, the smallest that is not -inf, and sum e^((x - m) / temperature)."""
    peak = float("-inf")
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    tempered = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = _load(row, column_step, start + tl.arange(0, BLOCK), V)
        new = tl.maximum(peak, tl.max(x, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        move = tl.where(peak == float("-inf"), 0.0, safe - peak)
        tempered = tempered * tl.exp(-move * inverse_temperature) + tl.exp((x - safe) * inverse_temperature)
        lowest = tl.minimum(lowest, tl.where(x == float("-inf"), float("inf"), x))
        peak = new
    return peak, tl.min(lowest, 0), tl.sum(tempered, 0)


@triton.jit
def _bisect(
    row, column_step, V, peak, inverse_temperature, floor, low, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """The smallest z above `low` with less than `limit` above it: columns if COUNT, else mass of those z >= floor.

    Each step splits the interval, reads the row once and moves the upper end to a value that occurs.
    """
    high = 0.0
    middle = (low + high) / 2
    while (middle > low) & (middle < high):
        total = tl.zeros([BLOCK], tl.float32)
        below = tl.full([BLOCK], float("-inf"), tl.float32)
        above = tl.full([BLOCK], float("inf"), tl.float32)
        for start in range(0, V, BLOCK):
            z = (_load(row, column_step, start + tl.arange(0, BLOCK), V) - peak) * inverse_temperature
            higher = z > middle
            if COUNT:
                total += tl.where(higher, 1.0, 0.0)
            else:
                total += tl.where(higher & (z >= floor), tl.exp(z), 0.0)
            below = tl.maximum(below, tl.where(higher, float("-inf"), z))
            above = tl.minimum(above, tl.where(higher, z, float("inf")))
        nearest = tl.max(below, 0)
        kept = (tl.sum(total, 0) < limit) & (nearest > low)
        finished = tl.min(above, 0) == high  # nothing between the middle and the upper end
        low = tl.where(kept, low, tl.where(finished, high, middle))
        high = tl.where(kept, nearest, high)
        middle = (low + high) / 2
    return high


@triton.jit
def _kept_mass(row, column_step, V, peak, inverse_temperature, threshold, BLOCK: tl.constexpr):
    """Mass of the columns with z >= threshold."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z = (_load(row, column_step, start + tl.arange(0, BLOCK), V) - peak) * inverse_temperature
        total += tl.where(z >= threshold, tl.exp(z), 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["top_k"], do_not_specialize_on_alignment=["thresholds"])
def _threshold_kernel(
    logits, peaks, thresholds, row_stride, column_step, V, inverse_temperature, top_k, top_p, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest logit of a row, and the smallest z that every filter keeps."""
    index = tl.program_id(0)
    row = logits + offset_of(index, row_stride)
    peak, lowest, mass = _row_range(row, column_step, V, inverse_temperature, BLOCK)
    threshold = float("-inf")
    if TOP_K:
        low = (lowest - peak) * inverse_temperature - 1
        threshold = _bisect(
            row, column_step, V, peak, inverse_temperature, threshold, low, top_k, True, BLOCK
        )  # fmt: skip
    if TOP_P:
        if TOP_K:
            mass = _kept_mass(row, column_step, V, peak, inverse_temperature, threshold, BLOCK)
        # Columns of mass <= (1 - top_p) mass / V sum to less than 1 - top_p: none of them is in the nucleus.
        low = tl.log(mass * ((1 - top_p) / V))
        nucleus = _bisect(
            row, column_step, V, peak, inverse_temperature, threshold, low, top_p * mass, False, BLOCK
        )  # fmt: skip
        threshold = tl.maximum(threshold, nucleus)
    if MIN_P:
        threshold = tl.maximum(threshold, log_min_p)
    tl.store(peaks + index, peak)
    tl.store(thresholds + index, threshold)


@triton.jit
def _words(cols, seed, step, row_id):
    """`counter.column_words` of int32 columns. The products wrap, also where triton would look for overflows."""
    mask = 0xFFFFFFFF
    key, multiplier, _, _ = tl.philox(
        seed,
        (step & mask).to(tl.uint32),
        ((step >> 32) & mask).to(tl.uint32),
        (row_id & mask).to(tl.uint32),
        ((row_id >> 32) & mask).to(tl.uint32),
    )
    words = tl.mul(cols, _SPREAD, sanitize_overflow=False) ^ key.to(tl.int32, bitcast=True)
    words = tl.mul(words, multiplier.to(tl.int32, bitcast=True) | 1, sanitize_overflow=False)
    words = tl.mul(words ^ (words >> 16), _MIX, sanitize_overflow=False)
    return words ^ (words >> 15)


@triton.jit
def _exponential(words):
    """`counter.exponential`: -log(1 - u), corrected for what 1 - u rounds away (Goldberg 1991, theorem 4)."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * _WORD, _LARGEST)
    w = 1 - u
    none = w == 1
    return tl.where(none, u, -tl.log(w) * (u / tl.where(none, 1.0, 1 - w)))


@triton.jit(do_not_specialize_on_alignment=["row_ids", "step_ptr", "seed_ptr", "thresholds"])
def _race_kernel(
    logits, row_ids, step_ptr, seed_ptr, peaks, thresholds, pieces, winners, row_stride, column_step, V,
    inverse_temperature,
    FILTERED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one tile of a row: the logit that masses are relative to, both sums, the best score and its column."""
    index, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(logits + offset_of(index, row_stride), column_step, cols, V)
    peak = tl.load(peaks + index) if FILTERED else tl.max(x, 0)
    x -= tl.where(peak == float("-inf"), 0.0, peak)
    z = x * inverse_temperature if TEMPERED else x
    mass = tl.exp(z)
    plain = tl.exp(x) if TEMPERED else mass
    if FILTERED:
        mass = tl.where(z >= tl.load(thresholds + index), mass, 0.0)
    words = _words(cols, tl.load(seed_ptr), tl.load(step_ptr), tl.load(row_ids + index))
    score, winner = tl.max(mass / _exponential(words), 0, return_indices=True)
    piece = pieces + offset_of(index, 4 * tiles) + tile
    tl.store(piece, peak)
    tl.store(piece + tiles, tl.sum(plain, 0))
    tl.store(piece + 2 * tiles, tl.sum(mass, 0))
    tl.store(piece + 3 * tiles, score)
    tl.store(winners + offset_of(index, tiles) + tile, tl.minimum(tile * BLOCK + winner, V - 1))


@triton.jit(do_not_specialize=["logprobs_stride", "tiles"], do_not_specialize_on_alignment=["token_ids", "logprobs"])
def _merge_kernel(
    logits, pieces, winners, token_ids, logprobs, row_stride, column_step, logprobs_stride, inverse_temperature,
    tiles, TILES: tl.constexpr,
):  # fmt: skip
    """A row's token and log-probabilities from its tiles, at most TILES of them."""
    index = tl.program_id(0)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    piece = pieces + offset_of(index, 4 * tiles) + tile
    tile_peak = tl.load(piece, mask=inside, other=float("-inf"))
    plain = tl.load(piece + tiles, mask=inside, other=0.0)
    mass = tl.load(piece + 2 * tiles, mask=inside, other=0.0)
    score = tl.load(piece + 3 * tiles, mask=inside, other=0.0)
    peak = tl.max(tile_peak, 0)
    below = tile_peak - tl.where(peak == float("-inf"), 0.0, peak)
    tempered = tl.exp(below * inverse_temperature)
    winner = tl.minimum(tl.argmax(score * tempered, 0), tiles - 1)  # of a row of NaN too
    token_id = tl.load(winners + offset_of(index, tiles) + winner)
    shifted = tl.load(logits + offset_of(index, row_stride) + offset_of(token_id, column_step)).to(tl.float32) - peak
    tl.store(token_ids + index, token_id)
    tl.store(logprobs + index, shifted - tl.log(tl.sum(plain * tl.exp(below), 0)))
    log_mass = tl.log(tl.sum(mass * tempered, 0))
    tl.store(logprobs + logprobs_stride + index, shifted * inverse_temperature - log_mass)


def sample_rows(
    logits: Tensor,
    row_ids: Tensor,
    step: Tensor,
    seed: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    """Writes token_ids [R] and logprobs [2, R] (plain softmax, sampling distribution) for logits [R, V]."""
    R, V = logits.shape
    if R == 0:
        return
    strides, inverse_temperature, device = logits.stride(), 1 / temperature, logits.device
    filters = {"TOP_K": 0 < top_k < V, "TOP_P": top_p < 1, "MIN_P": min_p > 0}
    filtered = any(filters.values())
    peaks = thresholds = logprobs  # some pointer, which no kernel follows
    if filtered:
        peaks, thresholds = torch.empty(2, R, dtype=torch.float32, device=device)
        _threshold_kernel[(R,)](
            logits, peaks, thresholds, *strides, V, inverse_temperature, top_k, top_p,
            math.log(min_p) if min_p > 0 else 0.0,
            **filters, BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS, **FUSION,
        )  # fmt: skip
    block = min(RACE_BLOCK, triton.next_power_of_2(V))
    tiles = triton.cdiv(V, block)
    pieces = torch.empty(R, 4, tiles, dtype=torch.float32, device=device)
    winners = torch.empty(R, tiles, dtype=torch.int32, device=device)
    _race_kernel[(R, tiles)](
        logits, row_ids.contiguous(), step, seed, peaks, thresholds, pieces, winners, *strides, V, inverse_temperature,
        FILTERED=filtered, TEMPERED=temperature != 1, BLOCK=block, num_warps=RACE_WARPS, **FUSION,
    )  # fmt: skip
    _merge_kernel[(R,)](
        logits, pieces, winners, token_ids, logprobs, *strides, logprobs.stride(0), inverse_temperature, tiles,
        TILES=triton.next_power_of_2(tiles), num_warps=MERGE_WARPS, **FUSION,
    )  # fmt: skip
