"""The mathematics of the row kernels, as Triton functions that a kernel calls for its row.

Offsets are int64: rows times columns passes 2^31 at 14,135 rows of 151,936. Loads are widened to float32 at once.
Columns past the end load as -inf, which exp turns into 0. A logit of -inf is kept out of every product, because
0 * -inf is NaN: its shifted value counts as 0 where its probability, 0, is the other factor. The sums stay apart
for each lane of a block and are reduced once a row; only the maxima are reduced once a block.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = 2048  # columns that a program holds at once; tests make it smaller, `benchmarks/row_blocks.py` times others
WARPS = 16
# A product and a sum are rounded once. Said in every launch: it is no default of triton's any more from 3.10 on.
FUSION = {"enable_fp_fusion": True}


def launch_options(V: int) -> dict[str, int]:
    """Block and warps of a launch, as they are set at that moment; no more columns at once than there are."""
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(V)), "num_warps": WARPS, **FUSION}


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether a launch there can begin before the one before it has ended: programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def given_or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """An absent tensor needs some pointer, which no kernel follows."""
    return stand_in if tensor is None else tensor


@triton.jit
def take_turn(EARLY: tl.constexpr):
    """Lets the next launch begin, whose programs come here too, and waits until the one before has ended: first of all
    in a kernel of which `starts_early` holds, before anything is read that another may have written."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def offset_of(index, stride):
    """index * stride in 64 bits."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def tempered_logits(
    row, step, cols, V, bias, scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """Tempered logits of the columns `cols`, -inf past the last column, and the softcap's slope there."""
    inside = cols < V
    x = tl.load(row + offset_of(cols, step), mask=inside, other=float("-inf")).to(tl.float32)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    x *= scale
    if HAS_CAP:
        tanh = 1 - 2 / (tl.exp(2 * x / softcap) + 1)  # exact at both ends, where the exponential is 0 or infinite
        x = softcap * tanh
        slope = 1 - tanh * tanh
    return tl.where(inside, x * inverse_temperature, float("-inf")), slope


@triton.jit
def power_and_part(x):
    """A float32 number as a power of two of its sign and what that is multiplied with, in [1, 2); 0 as 0 times 1."""
    power = (x.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True)  # its sign and exponent
    return power, tl.where(power == 0, 1.0, x / tl.where(power == 0, 1.0, power))


@triton.jit
def _peak(old, x):
    """The larger of `old` and all of x; then both of them for subtracting, without -inf."""
    new = tl.maximum(old, tl.max(x, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, safe, tl.where(old == float("-inf"), safe, old)


@triton.jit
def shifted(x, peak):
    """x - peak, 0 where x is -inf."""
    return tl.where(x == float("-inf"), 0.0, x - peak)


@triton.jit
def row_sums(
    student, teacher, student_step, teacher_step, V, student_bias, teacher_bias,
    student_scale, teacher_scale, student_softcap, teacher_softcap, inverse_temperature,
    STUDENT_BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of both rows. s and t are the logits less their maxima; the results are the maxima, sum e^s, sum e^t,
    sum e^s s, sum e^t t, sum e^s (s - t), sum e^t (t - s), and whether some column is -inf in the teacher alone
    and in the student alone."""
    peak_s = float("-inf")
    peak_t = float("-inf")
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    own_s = tl.zeros([BLOCK], tl.float32)
    own_t = tl.zeros([BLOCK], tl.float32)
    cross_s = tl.zeros([BLOCK], tl.float32)
    cross_t = tl.zeros([BLOCK], tl.float32)
    missed = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x, _ = tempered_logits(
            student, student_step, cols, V, student_bias, student_scale, student_softcap, inverse_temperature,
            STUDENT_BIAS, STUDENT_CAP,
        )  # fmt: skip
        y, _ = tempered_logits(
            teacher, teacher_step, cols, V, teacher_bias, teacher_scale, teacher_softcap, inverse_temperature,
            TEACHER_BIAS, TEACHER_CAP,
        )  # fmt: skip
        peak_s, new_s, old_s = _peak(peak_s, x)
        peak_t, new_t, old_t = _peak(peak_t, y)
        # A higher maximum lowers s, or t, by as much in everything summed so far.
        move_s = new_s - old_s
        move_t = new_t - old_t
        shrink_s = tl.exp(-move_s)
        shrink_t = tl.exp(-move_t)
        s = shifted(x, new_s)
        t = shifted(y, new_t)
        exp_s = tl.exp(x - new_s)
        exp_t = tl.exp(y - new_t)
        own_s = (own_s - sum_s * move_s) * shrink_s + exp_s * s
        own_t = (own_t - sum_t * move_t) * shrink_t + exp_t * t
        cross_s = (cross_s + sum_s * (move_t - move_s)) * shrink_s + exp_s * (s - t)
        cross_t = (cross_t + sum_t * (move_s - move_t)) * shrink_t + exp_t * (t - s)
        sum_s = sum_s * shrink_s + exp_s
        sum_t = sum_t * shrink_t + exp_t
        in_s = x > float("-inf")
        in_t = y > float("-inf")
        missed = missed | (in_s & (y == float("-inf"))).to(tl.int32) | ((in_t & (x == float("-inf"))).to(tl.int32) * 2)
    return (
        peak_s, peak_t, tl.sum(sum_s, 0), tl.sum(sum_t, 0), tl.sum(own_s, 0), tl.sum(own_t, 0),
        tl.sum(cross_s, 0), tl.sum(cross_t, 0), tl.max(missed & 1, 0) > 0, tl.max(missed & 2, 0) > 0,
    )  # fmt: skip


@triton.jit
def row_sum(
    row, step, V, bias, scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of one model's row: the largest logit and, with s the logits less that, sum e^s and sum e^s s."""
    peak = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x, _ = tempered_logits(row, step, cols, V, bias, scale, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
        peak, new, old = _peak(peak, x)
        move = new - old
        shrink = tl.exp(-move)
        e = tl.exp(x - new)
        own = (own - total * move) * shrink + e * shifted(x, new)
        total = total * shrink + e
    return peak, tl.sum(total, 0), tl.sum(own, 0)


@triton.jit
def token_logprob(
    row, step, token_id, V, bias, scale, softcap, inverse_temperature, peak, log_sum,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Log-probability of one column; NaN for a column that does not exist."""
    exists = (token_id >= 0) & (token_id < V)
    column = tl.where(exists, token_id, V) + tl.arange(0, 1)
    x, _ = tempered_logits(row, step, column, V, bias, scale, softcap, inverse_temperature, HAS_BIAS, HAS_CAP)
    return tl.where(exists, tl.sum(x, 0) - peak - log_sum, float("nan"))


@triton.jit
def sampled_loss(
    logprob, reward, at_sampling, advantage, importance_clip, IMPORTANCE: tl.constexpr, ADVANTAGE: tl.constexpr
):
    """-rho A log p(y) of a row, and rho A; `at_sampling` and `advantage` point at the row's."""
    ratio = 1.0
    if IMPORTANCE:
        ratio = tl.minimum(tl.exp(logprob - tl.load(at_sampling)), importance_clip)
    credit = reward
    if ADVANTAGE:
        credit = tl.load(advantage).to(tl.float32)
    factor = tl.where(ratio == 0, 0.0, ratio * credit)
    return tl.where((factor == 0) | (logprob == 0), 0.0, -factor * logprob), factor


@triton.jit
def lost_to_rounding(entry, token_id, V, dtype: tl.constexpr):
    """What a row's entry at its token loses in this dtype; 0 of a column that does not exist."""
    return tl.where(token_id < V, entry - entry.to(dtype).to(tl.float32), 0.0)


@triton.jit
def log_mixture_of(p, q, beta):
    """log(beta q + (1 - beta) p), finite where both are 0."""
    return tl.log(tl.maximum(beta * q + (1 - beta) * p, 1.1754944e-38))


@triton.jit
def mixture_kl(
    student, teacher, student_step, teacher_step, V, student_bias, teacher_bias,
    student_scale, teacher_scale, student_softcap, teacher_softcap, inverse_temperature,
    peak_s, peak_t, log_s, log_t, beta,
    STUDENT_BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """KL(p || m) and KL(q || m) for m = beta q + (1 - beta) p: a second read of both rows."""
    of_student = tl.zeros([BLOCK], tl.float32)
    of_teacher = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x, _ = tempered_logits(
            student, student_step, cols, V, student_bias, student_scale, student_softcap, inverse_temperature,
            STUDENT_BIAS, STUDENT_CAP,
        )  # fmt: skip
        y, _ = tempered_logits(
            teacher, teacher_step, cols, V, teacher_bias, teacher_scale, teacher_softcap, inverse_temperature,
            TEACHER_BIAS, TEACHER_CAP,
        )  # fmt: skip
        p = tl.exp(x - peak_s - log_s)
        q = tl.exp(y - peak_t - log_t)
        log_mixture = log_mixture_of(p, q, beta)
        of_student += p * (shifted(x, peak_s) - log_s - log_mixture)
        of_teacher += q * (shifted(y, peak_t) - log_t - log_mixture)
    return tl.sum(of_student, 0), tl.sum(of_teacher, 0)
