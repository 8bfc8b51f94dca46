"""`reverse_kl` in Triton: what `twin_reverse_kl` does for a CPU. Its forward pass is the kernel of `triton_rows`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.chunks import accumulation_dtype
from distill_kernels.triton_math import launch_options, offset_of, shifted, tempered_logits
from distill_kernels.triton_rows import token_stats
from distill_kernels.types import Head

_PLAIN = Head(bias=None, softcap=None, scale=1.0)


@triton.jit(
    do_not_specialize=["stats_stride", "normalisers_stride", "upstream_stride", "upstream_step"],
    do_not_specialize_on_alignment=["token_ids", "stats", "normalisers", "upstream"],
)
def _backward_kernel(
    student_ptr, teacher_ptr, token_ids, stats, normalisers, upstream, gradient_ptr,
    student_stride, student_step, teacher_stride, teacher_step, gradient_stride, stats_stride, normalisers_stride,
    upstream_stride, upstream_step, V, inverse_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    student = student_ptr + offset_of(row, student_stride)
    teacher = teacher_ptr + offset_of(row, teacher_stride)
    x, _ = tempered_logits(student, student_step, cols, V, student_ptr, 1.0, 1.0, inverse_temperature, False, False)
    y, _ = tempered_logits(teacher, teacher_step, cols, V, teacher_ptr, 1.0, 1.0, inverse_temperature, False, False)
    peak_s = tl.load(normalisers + row)
    log_s = tl.load(normalisers + normalisers_stride + row)
    peak_t = tl.load(normalisers + 2 * normalisers_stride + row)
    log_t = tl.load(normalisers + 3 * normalisers_stride + row)
    kl = tl.load(stats + 3 * stats_stride + row)
    entropy = tl.load(stats + 4 * stats_stride + row)
    mine = upstream + offset_of(row, upstream_step)
    of_logprob = tl.load(mine)
    of_kl = tl.where(kl == float("inf"), 0.0, tl.load(mine + offset_of(3, upstream_stride)))
    of_entropy = tl.load(mine + offset_of(4, upstream_stride))
    kl = tl.where(kl == float("inf"), 0.0, kl)

    p = tl.exp(x - peak_s - log_s)
    s = shifted(x, peak_s) - log_s
    t = shifted(y, peak_t) - log_t
    onehot = tl.where(cols == tl.load(token_ids + row), 1.0, 0.0)
    gradient = of_logprob * onehot + p * (of_kl * (s - t - kl) - of_entropy * (s + entropy) - of_logprob)
    gradient = (gradient * inverse_temperature).to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + offset_of(row, gradient_stride) + cols, gradient, mask=cols < V)


def reverse_kl_forward(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """[6, K] statistics and [4, K] normalisers: maximum and log-sum of the student, then of the teacher."""
    K = student_logits.shape[0]
    dtype = accumulation_dtype(student_logits, teacher_logits)
    stats = torch.empty(6, K, dtype=dtype, device=student_logits.device)
    normalisers = torch.empty(4, K, dtype=dtype, device=student_logits.device)
    token_stats(
        student_logits,
        teacher_logits,
        token_ids,
        stats,
        temperature=temperature,
        student_head=_PLAIN,
        teacher_head=_PLAIN,
        normalisers=normalisers,
    )
    return stats, normalisers


def reverse_kl_backward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    stats: Tensor,
    normalisers: Tensor,
    upstream: Tensor,
    gradient: Tensor,
    temperature: float,
) -> None:
    """Writes the gradient [K, V] of the student's logits for upstream gradients [6, K] of the statistics."""
    K, V = student_logits.shape
    if K == 0:
        return
    options = launch_options(V)
    # Rows are the grid's first dimension, the only one that may pass 65,535.
    _backward_kernel[(K, triton.cdiv(V, options["BLOCK"]))](
        student_logits,
        teacher_logits,
        token_ids.contiguous(),
        stats,
        normalisers,
        upstream,
        gradient,
        student_logits.stride(0),
        student_logits.stride(1),
        teacher_logits.stride(0),
        teacher_logits.stride(1),
        gradient.stride(0),
        stats.stride(0),
        normalisers.stride(0),
        upstream.stride(0),
        upstream.stride(1),
        V,
        1 / temperature,
        **options,
    )
