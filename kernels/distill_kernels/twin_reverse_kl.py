"""`reverse_kl` in PyTorch, some rows at a time: what `triton_reverse_kl` does for CUDA.

The normalisers that the forward pass keeps save the backward pass its maxima and sums: one exponential a column.
"""

import math

import torch
from torch import Tensor

from distill_kernels.chunks import accumulation_dtype
from distill_kernels.twin_rows import FLOOR, row_slices, softmax_of, write_stats
from distill_kernels.types import Head

_PLAIN = Head(bias=None, softcap=None, scale=1.0)


def reverse_kl_forward(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """[6, K] statistics, and [4, K] normalisers: largest logit and log of the sum, student's and teacher's."""
    K = len(student_logits)
    dtype = accumulation_dtype(student_logits, teacher_logits)
    stats, normalisers = torch.empty(6, K, dtype=dtype), torch.empty(4, K, dtype=dtype)
    for part, (exps_s, exps_t, work) in row_slices(student_logits, dtype):
        s = softmax_of(student_logits[part].to(dtype, copy=True), exps_s, _PLAIN, temperature)
        t = softmax_of(teacher_logits[part].to(dtype, copy=True), exps_t, _PLAIN, temperature)
        write_stats(s, t, token_ids[part], work, stats[:, part])
        normalisers[:, part] = torch.cat([s.peak, s.log_total, t.peak, t.log_total], dim=1).T
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
    of_logprob, of_kl, of_entropy = (upstream[field, :, None] / temperature for field in (0, 3, 4))
    kl, entropy = stats[3, :, None], stats[4, :, None]
    of_kl, kl = of_kl.masked_fill(kl == math.inf, 0), kl.masked_fill(kl == math.inf, 0)
    with_entropy, with_logprob = of_entropy.any(), of_logprob.any()
    for part, (p, log_p, work) in row_slices(student_logits, stats.dtype):
        _log_softmax(student_logits[part], normalisers[:2, part, None], temperature, log_p)
        _log_softmax(teacher_logits[part], normalisers[2:, part, None], temperature, work)
        torch.exp(log_p, out=p)
        torch.sub(log_p, work, out=work).sub_(kl[part]).mul_(of_kl[part])
        if with_entropy:
            work.addcmul_(log_p.add_(entropy[part]), of_entropy[part], value=-1)
        if with_logprob:
            work.sub_(of_logprob[part])
        work.mul_(p).scatter_add_(1, token_ids[part, None], of_logprob[part])
        gradient[part] = work


def _log_softmax(logits: Tensor, normalisers: Tensor, temperature: float, out: Tensor) -> None:
    """out [r, V] = log-probabilities of logits [r, V], `FLOOR` where they are -inf; normalisers [2, r, 1].

    The largest is taken off first: its difference from a logit of like size is exact.
    """
    peak, log_total = normalisers
    if temperature == 1:
        torch.sub(logits, peak, out=out)
    else:
        torch.div(logits, temperature, out=out).sub_(peak)
    if not out.amin() > -math.inf:
        out.masked_fill_(out == -math.inf, FLOOR)
    out.sub_(log_total)
