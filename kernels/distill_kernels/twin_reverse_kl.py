"""`reverse_kl` in PyTorch, some rows at a time: what `triton_reverse_kl` does for CUDA."""

import math

import torch
from torch import Tensor

from distill_kernels.chunks import accumulation_dtype, chunks
from distill_kernels.twin_rows import cached_rows, row_slices, softmax_of, token_stats
from distill_kernels.types import Head

_PLAIN = Head(bias=None, softcap=None, scale=1.0)


def reverse_kl_forward(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """[6, K] statistics, and [4, K] normalisers, which stay 0: this implementation makes them anew."""
    K, V = student_logits.shape
    dtype = accumulation_dtype(student_logits, teacher_logits)
    stats, normalisers = torch.empty(6, K, dtype=dtype), torch.zeros(4, K, dtype=dtype)
    for part in chunks(K, cached_rows(V, dtype)):
        token_stats(
            student_logits[part].to(dtype, copy=True),
            teacher_logits[part].to(dtype, copy=True),
            token_ids[part],
            stats[:, part],
            temperature=temperature,
            student_head=_PLAIN,
            teacher_head=_PLAIN,
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
    """Writes the gradient [K, V] of the student's logits for upstream gradients [6, K] of the statistics.

    p (g_kl (log p - log q - KL) - g_H (log p + H) - g_logprob), and + g_logprob at the token.
    """
    dtype = stats.dtype
    for part, (exps_s, exps_t, work) in row_slices(student_logits, dtype):
        s = softmax_of(student_logits[part].to(dtype, copy=True), exps_s, _PLAIN, temperature)
        t = softmax_of(teacher_logits[part].to(dtype, copy=True), exps_t, _PLAIN, temperature)
        of_logprob, of_kl, of_entropy = (upstream[field, part, None] for field in (0, 3, 4))
        kl, entropy = stats[3, part, None], stats[4, part, None]
        infinite = kl == math.inf
        mean = (kl + s.log_total - t.log_total).masked_fill(infinite, 0)  # of the shifted difference
        torch.sub(s.shifted, t.shifted, out=work).sub_(mean).mul_(of_kl.masked_fill(infinite, 0))
        work.addcmul_(s.shifted.sub_(s.log_total - entropy), -of_entropy).sub_(of_logprob)
        work.mul_(s.exps).div_(s.total * temperature)
        work.scatter_add_(1, token_ids[part, None], of_logprob / temperature)
        gradient[part] = work
