"""Row kernels of what a teacher's likeliest tokens leave, in Triton, one program a row: see `linear_top_loss`."""

import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_math import given_or, launch_options, offset_of, row_sum, tempered_logits
from distill_kernels.types import Head


@triton.jit(do_not_specialize=["found_stride"], do_not_specialize_on_alignment=["found"])
def _sums_kernel(
    student_ptr, student_bias, found, student_stride, student_step, found_stride, V,
    student_scale, student_softcap, inverse_temperature,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    peak, total, own = row_sum(
        student_ptr + offset_of(row, student_stride), student_step, V, student_bias, student_scale, student_softcap,
        inverse_temperature, STUDENT_BIAS, STUDENT_CAP, BLOCK,
    )  # fmt: skip
    tl.store(found + row, peak)
    tl.store(found + found_stride + row, total)
    tl.store(found + 2 * found_stride + row, own)


@triton.jit(do_not_specialize_on_alignment=["log_total_ptr", "coefficient_ptr"])
def _gradient_kernel(
    student_ptr, student_bias, log_total_ptr, coefficient_ptr, grad_ptr, student_stride, student_step, grad_stride, V,
    student_scale, student_softcap, inverse_temperature,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    student = student_ptr + offset_of(row, student_stride)
    grad = grad_ptr + offset_of(row, grad_stride)
    log_total = tl.maximum(tl.load(log_total_ptr + row), -3.4028234e38)
    coefficient = tl.load(coefficient_ptr + row)
    # Last block first: what the sums have read last is what the L2 cache still holds.
    last = (V - 1) // BLOCK * BLOCK
    for back in range(0, V, BLOCK):
        cols = last - back + tl.arange(0, BLOCK)
        x, slope = tempered_logits(
            student, student_step, cols, V, student_bias, student_scale, student_softcap, inverse_temperature,
            STUDENT_BIAS, STUDENT_CAP,
        )  # fmt: skip
        gradient = tl.exp(x - log_total) * coefficient * slope
        tl.store(grad + cols, gradient.to(grad_ptr.dtype.element_ty), mask=cols < V)


def rest_sums(logits: Tensor, head: Head, temperature: float) -> Tensor:
    """As the twin's, and leaves the logits as they are."""
    k, V = logits.shape
    found = logits.new_empty(3, k)
    if k:
        _sums_kernel[(k,)](
            logits, given_or(head.bias, logits), found, logits.stride(0), logits.stride(1), found.stride(0), V,
            head.scale, head.softcap or 1.0, 1 / temperature, STUDENT_BIAS=head.bias is not None,
            STUDENT_CAP=head.softcap is not None, **launch_options(V),
        )  # fmt: skip
    return found


def rest_gradient(
    logits: Tensor, log_total: Tensor, coefficient: Tensor, grad: Tensor, head: Head, temperature: float
) -> None:
    """As the twin's, of raw logits."""
    k, V = logits.shape
    if k:
        _gradient_kernel[(k,)](
            logits, given_or(head.bias, logits), log_total, coefficient, grad, logits.stride(0), logits.stride(1),
            grad.stride(0), V, head.scale, head.softcap or 1.0, 1 / temperature, STUDENT_BIAS=head.bias is not None,
            STUDENT_CAP=head.softcap is not None, **launch_options(V),
        )  # fmt: skip
