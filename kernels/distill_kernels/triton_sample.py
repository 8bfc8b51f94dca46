"""Drawing tokens in Triton: what `twin_sample` does for a CPU. One program a row, which it reads some times over.

With z = (logit - largest logit) / temperature, so that the largest is 0 and e^z its mass.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_math import FUSION, offset_of

BLOCK = 4096  # columns that a program holds at once; tests make it smaller
WARPS = 16


@triton.jit
def _load(row, column_step, cols, V):
    """Logits of the columns `cols`, -inf past the last column."""
    return tl.load(row + offset_of(cols, column_step), mask=cols < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _row_sums(row, column_step, V, inverse_temperature, BLOCK: tl.constexpr):
    """One read: the largest logit m, the smallest that is not -inf, sum e^(x - m), sum e^((x - m) / temperature)."""
    peak = float("-inf")
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    tempered = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = _load(row, column_step, start + tl.arange(0, BLOCK), V)
        new = tl.maximum(peak, tl.max(x, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        move = tl.where(peak == float("-inf"), 0.0, safe - peak)
        plain = plain * tl.exp(-move) + tl.exp(x - safe)
        tempered = tempered * tl.exp(-move * inverse_temperature) + tl.exp((x - safe) * inverse_temperature)
        lowest = tl.minimum(lowest, tl.where(x == float("-inf"), float("inf"), x))
        peak = new
    return peak, tl.min(lowest, 0), tl.sum(plain, 0), tl.sum(tempered, 0)


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


@triton.jit
def _draw(row, column_step, V, peak, inverse_temperature, threshold, target, BLOCK: tl.constexpr):
    """The first column at which the cumulative mass of those with z >= threshold passes `target` (float64)."""
    before = tl.cast(0.0, tl.float64)
    found = -1
    last = -1
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = (_load(row, column_step, cols, V) - peak) * inverse_temperature
        mass = tl.where(z >= threshold, tl.exp(z), 0.0)
        after = before + tl.sum(mass, 0).to(tl.float64)
        # Rounding may leave the target at or past the last mass: then the last column with mass is drawn.
        last = tl.maximum(last, tl.max(tl.where(mass > 0, cols, -1), 0))
        if (found < 0) & (after > target):
            passed = (tl.cumsum(mass, 0) > (target - before).to(tl.float32)) & (mass > 0)
            first = tl.min(tl.where(passed, cols, V), 0)
            found = tl.where(first < V, first, last)
        before = after
    return tl.where(found < 0, last, found)


@triton.jit(
    do_not_specialize=["logprobs_stride", "seed", "top_k"],
    do_not_specialize_on_alignment=["row_ids", "step_ptr", "token_ids", "logprobs"],
)
def _sample_kernel(
    logits, row_ids, step_ptr, token_ids, logprobs, row_stride, column_step, logprobs_stride, V,
    seed, inverse_temperature, top_k, top_p, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = logits + offset_of(index, row_stride)
    peak, lowest, plain, mass = _row_sums(row, column_step, V, inverse_temperature, BLOCK)
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
    if TOP_K or TOP_P or MIN_P:
        mass = _kept_mass(row, column_step, V, peak, inverse_temperature, threshold, BLOCK)

    step = tl.load(step_ptr)
    row_id = tl.load(row_ids + index)
    mask = 0xFFFFFFFF
    bits, _, _, _ = tl.philox(
        seed,
        (step & mask).to(tl.uint32),
        ((step >> 32) & mask).to(tl.uint32),
        (row_id & mask).to(tl.uint32),
        ((row_id >> 32) & mask).to(tl.uint32),
    )
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    token_id = _draw(
        row, column_step, V, peak, inverse_temperature, threshold, uniform * mass.to(tl.float64), BLOCK
    )  # fmt: skip
    shifted = tl.load(row + offset_of(token_id, column_step)).to(tl.float32) - peak
    tl.store(token_ids + index, token_id)
    tl.store(logprobs + index, shifted - tl.log(plain))
    tl.store(logprobs + logprobs_stride + index, shifted * inverse_temperature - tl.log(mass))


def sample_rows(
    logits: Tensor,
    row_ids: Tensor,
    step: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    *,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    """Writes token_ids [R] and logprobs [2, R] (plain softmax, sampling distribution) for logits [R, V]."""
    R, V = logits.shape
    if R == 0:
        return
    _sample_kernel[(R,)](
        logits,
        row_ids.contiguous(),
        step,
        token_ids,
        logprobs,
        logits.stride(0),
        logits.stride(1),
        logprobs.stride(0),
        V,
        seed,
        1 / temperature,
        top_k,
        top_p,
        math.log(min_p) if min_p > 0 else 0.0,
        TOP_K=0 < top_k < V,
        TOP_P=top_p < 1,
        MIN_P=min_p > 0,
        BLOCK=min(BLOCK, triton.next_power_of_2(V)),
        num_warps=WARPS,
        **FUSION,
    )
