"""Row kernel of a student alone in Triton, one program a row: what `twin_student_rows` does for a CPU."""

import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_math import (
    given_or,
    launch_options,
    lost_to_rounding,
    offset_of,
    power_and_part,
    row_sum,
    sampled_loss,
    tempered_logits,
    token_logprob,
)
from distill_kernels.types import Head


@triton.jit(
    do_not_specialize=["stats_stride"],
    do_not_specialize_on_alignment=[
        "token_ids", "teacher_ptr", "at_sampling_ptr", "advantage_ptr", "task_ptr", "weight_ptr", "stats", "losses",
        "row_scale", "lost",
    ],
)  # fmt: skip
def _student_rows_kernel(
    student_ptr, student_bias, token_ids, teacher_ptr, at_sampling_ptr, advantage_ptr, task_ptr, weight_ptr,
    stats, losses, row_scale, lost, grad_ptr, student_stride, student_step, stats_stride, grad_stride, V,
    student_scale, student_softcap, inverse_temperature, importance_clip,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER: tl.constexpr, IMPORTANCE: tl.constexpr,
    ADVANTAGE: tl.constexpr, TASK: tl.constexpr, WEIGHT: tl.constexpr, LOST: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    student = student_ptr + offset_of(row, student_stride)
    peak, total, own = row_sum(
        student, student_step, V, student_bias, student_scale, student_softcap, inverse_temperature,
        STUDENT_BIAS, STUDENT_CAP, BLOCK,
    )  # fmt: skip
    log_total = tl.log(total)
    token_id = tl.load(token_ids + row)
    logprob = token_logprob(
        student, student_step, token_id, V, student_bias, student_scale, student_softcap, inverse_temperature,
        peak, log_total, STUDENT_BIAS, STUDENT_CAP,
    )  # fmt: skip
    unknown = float("nan")
    teacher_logprob = unknown
    if TEACHER:
        teacher_logprob = tl.load(teacher_ptr + row).to(tl.float32)
    impossible = (logprob == float("-inf")) & (teacher_logprob == float("-inf"))
    reward = tl.where(impossible, 0.0, teacher_logprob - logprob)
    tl.store(stats + row, logprob)
    tl.store(stats + stats_stride + row, teacher_logprob)
    tl.store(stats + 2 * stats_stride + row, reward)
    tl.store(stats + 3 * stats_stride + row, unknown)
    tl.store(stats + 4 * stats_stride + row, log_total - own / total)
    tl.store(stats + 5 * stats_stride + row, unknown)
    loss, factor = sampled_loss(
        logprob, reward, at_sampling_ptr + row, advantage_ptr + row, importance_clip, IMPORTANCE, ADVANTAGE
    )
    if TASK:
        more, credit = sampled_loss(
            logprob, reward, at_sampling_ptr + row, task_ptr + row, importance_clip, IMPORTANCE, True
        )
        loss += more
        factor += credit
    tl.store(losses + row, loss)
    infinite = (loss == float("inf")) | (loss == float("-inf"))
    factor = tl.where(infinite, 0.0, factor)
    part = 1.0
    if WEIGHT:  # what does not fit a power of two goes into the gradient, which is rounded but once then
        factor, part = power_and_part(factor * tl.load(weight_ptr + row))
    tl.store(row_scale + row, factor)
    if GRADIENT:
        grad = grad_ptr + offset_of(row, grad_stride)
        entry = tl.zeros([BLOCK], tl.float32)
        # Last block first: what the sums have read last is what the L2 cache still holds.
        last = (V - 1) // BLOCK * BLOCK
        for back in range(0, V, BLOCK):
            cols = last - back + tl.arange(0, BLOCK)
            x, slope = tempered_logits(
                student, student_step, cols, V, student_bias, student_scale, student_softcap,
                inverse_temperature, STUDENT_BIAS, STUDENT_CAP,
            )  # fmt: skip
            gradient = (tl.exp(x - peak - log_total) - tl.where(cols == token_id, 1.0, 0.0)) * slope * part
            if LOST:
                entry += tl.where(cols == token_id, gradient, 0.0)
            tl.store(grad + cols, gradient.to(grad_ptr.dtype.element_ty), mask=cols < V)
        if LOST:
            tl.store(lost + row, lost_to_rounding(tl.sum(entry, 0), token_id, V, grad_ptr.dtype.element_ty))


def student_rows(
    logits: Tensor,
    token_ids: Tensor,
    *,
    teacher_logprob: Tensor | None,
    sampling_logprob: Tensor | None,
    advantage: Tensor | None,
    stats: Tensor,
    losses: Tensor,
    row_scale: Tensor,
    grad: Tensor | None,
    importance_clip: float | None,
    temperature: float,
    head: Head,
    task_advantage: Tensor | None = None,
    token_weight: Tensor | None = None,
    lost: Tensor | None = None,
) -> None:
    """Statistics [6, k], losses [k] and the gradient of k rows of raw logits [k, V].

    The gradient of row k's loss with respect to its tempered logits is row_scale[k] * grad[k]. `grad` may be `logits`
    itself, or None. With `token_weight` [k] float32 it is that of the weighted loss, and row_scale a power of two,
    which rounds nothing. `lost` [k] float32 receives what the dtype of `grad` left out of each row's entry at its
    token, in the units of `grad`.
    """
    k, V = logits.shape
    if k == 0:
        return
    given = (teacher_logprob, sampling_logprob, advantage, task_advantage, token_weight)
    _student_rows_kernel[(k,)](
        logits,
        given_or(head.bias, logits),
        token_ids.contiguous(),
        *[stats if values is None else values.contiguous() for values in given],
        stats,
        losses,
        row_scale,
        given_or(lost, stats),
        given_or(grad, logits),
        logits.stride(0),
        logits.stride(1),
        stats.stride(0),
        given_or(grad, logits).stride(0),
        V,
        head.scale,
        head.softcap or 1.0,
        1 / temperature,
        float("inf") if importance_clip is None else importance_clip,
        STUDENT_BIAS=head.bias is not None,
        STUDENT_CAP=head.softcap is not None,
        TEACHER=teacher_logprob is not None,
        IMPORTANCE=sampling_logprob is not None,
        ADVANTAGE=advantage is not None,
        TASK=task_advantage is not None,
        WEIGHT=token_weight is not None,
        LOST=lost is not None,
        GRADIENT=grad is not None,
        **launch_options(V),
    )
