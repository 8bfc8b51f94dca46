"""Row kernel of the linear ops in Triton, one program a row: what `twin_rows` does for a CPU."""

import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_math import (
    given_or,
    launch_options,
    log_mixture_of,
    lost_to_rounding,
    mixture_kl,
    offset_of,
    power_and_part,
    row_sums,
    sampled_loss,
    shifted,
    tempered_logits,
    token_logprob,
)
from distill_kernels.types import OBJECTIVES, Head

_NONE, _SAMPLED, _REVERSE, _FORWARD, _JSD = (tl.constexpr(code) for code in range(-1, len(OBJECTIVES)))


# What changes with the number of rows, from one step to the next, may not make another kernel: neither its size nor
# where it begins. Pointers and strides of logits are specialised, which their loads of several columns need.
@triton.jit(
    do_not_specialize=["stats_stride", "normalisers_stride"],
    do_not_specialize_on_alignment=[
        "token_ids", "at_sampling_ptr", "advantage_ptr", "task_ptr", "weight_ptr", "stats", "normalisers", "losses",
        "row_scale", "lost",
    ],
)  # fmt: skip
def _rows_kernel(
    student_ptr, teacher_ptr, student_bias, teacher_bias, token_ids, at_sampling_ptr, advantage_ptr, task_ptr,
    weight_ptr, stats, normalisers, losses, row_scale, lost, grad_ptr,
    student_stride, student_step, teacher_stride, teacher_step, stats_stride, normalisers_stride, grad_stride, V,
    student_scale, teacher_scale, student_softcap, teacher_softcap, inverse_temperature, importance_clip, beta,
    STUDENT_BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr,
    OBJECTIVE: tl.constexpr, IMPORTANCE: tl.constexpr, ADVANTAGE: tl.constexpr, TASK: tl.constexpr,
    WEIGHT: tl.constexpr, NORMALISERS: tl.constexpr, LOST: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    student = student_ptr + offset_of(row, student_stride)
    teacher = teacher_ptr + offset_of(row, teacher_stride)
    peak_s, peak_t, sum_s, sum_t, own_s, own_t, cross_s, cross_t, missed_s, missed_t = row_sums(
        student, teacher, student_step, teacher_step, V, student_bias, teacher_bias,
        student_scale, teacher_scale, student_softcap, teacher_softcap, inverse_temperature,
        STUDENT_BIAS, TEACHER_BIAS, STUDENT_CAP, TEACHER_CAP, BLOCK,
    )  # fmt: skip
    log_s = tl.log(sum_s)
    log_t = tl.log(sum_t)
    token_id = tl.load(token_ids + row)
    logprob_s = token_logprob(
        student, student_step, token_id, V, student_bias, student_scale, student_softcap, inverse_temperature,
        peak_s, log_s, STUDENT_BIAS, STUDENT_CAP,
    )  # fmt: skip
    logprob_t = token_logprob(
        teacher, teacher_step, token_id, V, teacher_bias, teacher_scale, teacher_softcap, inverse_temperature,
        peak_t, log_t, TEACHER_BIAS, TEACHER_CAP,
    )  # fmt: skip
    impossible = (logprob_s == float("-inf")) & (logprob_t == float("-inf"))
    reward = tl.where(impossible, 0.0, logprob_t - logprob_s)
    kl = tl.where(missed_s, float("inf"), cross_s / sum_s - log_s + log_t)
    tl.store(stats + row, logprob_s)
    tl.store(stats + stats_stride + row, logprob_t)
    tl.store(stats + 2 * stats_stride + row, reward)
    tl.store(stats + 3 * stats_stride + row, kl)
    tl.store(stats + 4 * stats_stride + row, log_s - own_s / sum_s)
    tl.store(stats + 5 * stats_stride + row, log_t - own_t / sum_t)
    if NORMALISERS:
        tl.store(normalisers + row, peak_s)
        tl.store(normalisers + normalisers_stride + row, log_s)
        tl.store(normalisers + 2 * normalisers_stride + row, peak_t)
        tl.store(normalisers + 3 * normalisers_stride + row, log_t)

    if OBJECTIVE != _NONE:
        student_kl = kl
        if OBJECTIVE == _SAMPLED:
            loss, factor = sampled_loss(
                logprob_s, reward, at_sampling_ptr + row, advantage_ptr + row, importance_clip, IMPORTANCE, ADVANTAGE
            )
        elif OBJECTIVE == _REVERSE:
            factor = 1.0
            loss = kl
        elif OBJECTIVE == _FORWARD:
            factor = 1.0
            loss = tl.where(missed_t, float("inf"), cross_t / sum_t - log_t + log_s)
        else:
            factor = 1 - beta
            student_kl, teacher_kl = mixture_kl(
                student, teacher, student_step, teacher_step, V, student_bias, teacher_bias,
                student_scale, teacher_scale, student_softcap, teacher_softcap, inverse_temperature,
                peak_s, peak_t, log_s, log_t, beta, STUDENT_BIAS, TEACHER_BIAS, STUDENT_CAP, TEACHER_CAP, BLOCK,
            )  # fmt: skip
            loss = beta * teacher_kl + (1 - beta) * student_kl
        credit = 0.0
        if TASK:
            more, credit = sampled_loss(
                logprob_s, reward, at_sampling_ptr + row, task_ptr + row, importance_clip, IMPORTANCE, True
            )
            loss += more
            if OBJECTIVE == _SAMPLED:
                factor += credit
            elif OBJECTIVE == _JSD:
                credit = credit / factor
        infinite = (loss == float("inf")) | (loss == float("-inf"))
        tl.store(losses + row, loss)
        factor = tl.where(infinite, 0.0, factor)
        part = 1.0
        if WEIGHT:  # what does not fit a power of two goes into the gradient, which is rounded but once then
            factor, part = power_and_part(factor * tl.load(weight_ptr + row))
        tl.store(row_scale + row, factor)
        if GRADIENT:
            student_kl = tl.where(infinite, 0.0, student_kl)
            credit = tl.where(infinite, 0.0, credit)
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
                p = tl.exp(x - peak_s - log_s)
                if OBJECTIVE == _SAMPLED:
                    gradient = p - tl.where(cols == token_id, 1.0, 0.0)
                else:
                    y, _ = tempered_logits(
                        teacher, teacher_step, cols, V, teacher_bias, teacher_scale, teacher_softcap,
                        inverse_temperature, TEACHER_BIAS, TEACHER_CAP,
                    )  # fmt: skip
                    q = tl.exp(y - peak_t - log_t)
                    s = shifted(x, peak_s) - log_s
                    if OBJECTIVE == _REVERSE:
                        gradient = p * (s - (shifted(y, peak_t) - log_t) - student_kl)
                    elif OBJECTIVE == _FORWARD:
                        gradient = p - q
                    else:
                        gradient = p * (s - log_mixture_of(p, q, beta) - student_kl)
                    if TASK:
                        gradient += credit * (p - tl.where(cols == token_id, 1.0, 0.0))
                gradient = gradient * slope * part
                if LOST:
                    entry += tl.where(cols == token_id, gradient, 0.0)
                tl.store(grad + cols, gradient.to(grad_ptr.dtype.element_ty), mask=cols < V)
            if LOST:
                tl.store(lost + row, lost_to_rounding(tl.sum(entry, 0), token_id, V, grad_ptr.dtype.element_ty))


def token_stats(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    stats: Tensor,
    *,
    temperature: float,
    student_head: Head,
    teacher_head: Head,
    normalisers: Tensor | None = None,
) -> None:
    """Writes the six statistics [6, k] of k rows of raw logits [k, V], and the normalisers [4, k] where wanted."""
    _launch_rows(
        student,
        teacher,
        token_ids,
        stats,
        temperature=temperature,
        student_head=student_head,
        teacher_head=teacher_head,
        normalisers=normalisers,
    )


def distill_rows(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    sampling_logprob: Tensor | None,
    stats: Tensor,
    losses: Tensor,
    row_scale: Tensor,
    grad: Tensor | None,
    *,
    advantage: Tensor | None,
    objective: int,
    importance_clip: float | None,
    beta: float,
    temperature: float,
    student_head: Head,
    teacher_head: Head,
    task_advantage: Tensor | None = None,
    token_weight: Tensor | None = None,
    lost: Tensor | None = None,
) -> None:
    """Statistics [6, k], losses [k] and the gradient of k rows of raw logits [k, V].

    The gradient of row k's loss with respect to its tempered logits is row_scale[k] * grad[k]; the factor stays
    apart because the caller can apply it to H columns instead of V. `grad` may be `student` itself, or None. With
    `token_weight` [k] float32 it is that of the weighted loss, and row_scale a power of two, which rounds nothing.
    `lost` [k] float32, where a sampled term is in the loss, receives what the dtype of `grad` left out of each row's
    entry at its token, in the units of `grad`.
    """
    _launch_rows(
        student,
        teacher,
        token_ids,
        stats,
        temperature=temperature,
        student_head=student_head,
        teacher_head=teacher_head,
        objective=objective,
        sampling_logprob=sampling_logprob,
        advantage=advantage,
        task_advantage=task_advantage,
        importance_clip=importance_clip,
        beta=beta,
        losses=losses,
        row_scale=row_scale,
        grad=grad,
        token_weight=token_weight,
        lost=lost,
    )


def _launch_rows(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    stats: Tensor,
    *,
    temperature: float,
    student_head: Head,
    teacher_head: Head,
    normalisers: Tensor | None = None,
    objective: int = -1,
    sampling_logprob: Tensor | None = None,
    advantage: Tensor | None = None,
    task_advantage: Tensor | None = None,
    importance_clip: float | None = None,
    beta: float = 0.5,
    losses: Tensor | None = None,
    row_scale: Tensor | None = None,
    grad: Tensor | None = None,
    token_weight: Tensor | None = None,
    lost: Tensor | None = None,
) -> None:
    k, V = student.shape
    if k == 0:
        return
    _rows_kernel[(k,)](
        student,
        teacher,
        given_or(student_head.bias, student),
        given_or(teacher_head.bias, teacher),
        token_ids.contiguous(),
        stats if sampling_logprob is None else sampling_logprob.contiguous(),
        stats if advantage is None else advantage.contiguous(),
        stats if task_advantage is None else task_advantage.contiguous(),
        given_or(token_weight, stats),
        stats,
        given_or(normalisers, stats),
        given_or(losses, stats),
        given_or(row_scale, stats),
        given_or(lost, stats),
        given_or(grad, student),
        student.stride(0),
        student.stride(1),
        teacher.stride(0),
        teacher.stride(1),
        stats.stride(0),
        given_or(normalisers, stats).stride(0),
        given_or(grad, student).stride(0),
        V,
        student_head.scale,
        teacher_head.scale,
        student_head.softcap or 1.0,
        teacher_head.softcap or 1.0,
        1 / temperature,
        float("inf") if importance_clip is None else importance_clip,
        beta,
        STUDENT_BIAS=student_head.bias is not None,
        TEACHER_BIAS=teacher_head.bias is not None,
        STUDENT_CAP=student_head.softcap is not None,
        TEACHER_CAP=teacher_head.softcap is not None,
        OBJECTIVE=objective,
        IMPORTANCE=sampling_logprob is not None,
        ADVANTAGE=advantage is not None,
        TASK=task_advantage is not None,
        WEIGHT=token_weight is not None,
        NORMALISERS=normalisers is not None,
        LOST=lost is not None,
        GRADIENT=grad is not None,
        **launch_options(V),
    )
