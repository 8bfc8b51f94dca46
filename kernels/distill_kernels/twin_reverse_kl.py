"""`reverse_kl` in PyTorch, some rows at a time: what `triton_reverse_kl` does for CUDA.

The normalisers that the forward pass keeps save the backward pass its maxima and sums: one exponential a column.
"""

import math

import torch
from torch import Tensor

from distill_kernels.chunks import accumulation_dtype
from distill_kernels.twin_rows import RowSums, exponentials, row_slices, row_sums, shift, shifted_softmax, write_stats


def reverse_kl_forward(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """[6, K] statistics, and [4, K] normalisers: largest logit and log of the sum, student's and teacher's."""
    K = len(student_logits)
    dtype = accumulation_dtype(student_logits, teacher_logits)
    sums, peaks = torch.empty(len(RowSums._fields), K, dtype=dtype), torch.empty(2, K, 1, dtype=dtype)
    for part, (shifted_s, exps_s, shifted_t, exps_t, work) in row_slices(student_logits, dtype, buffers=5):
        s = shifted_softmax(_tempered(student_logits[part], temperature, shifted_s), shifted_s, exps_s)
        t = shifted_softmax(_tempered(teacher_logits[part], temperature, shifted_t), shifted_t, exps_t)
        torch.stack(row_sums(s, t, work), out=sums[:, part])
        torch.stack([s.peak, t.peak], out=peaks[:, part])
    stats, of_rows = torch.empty(6, K, dtype=dtype), RowSums(*sums)
    tokens = [
        logits.gather(1, token_ids[:, None]).to(dtype).div_(temperature).sub_(peak)[:, 0]
        for logits, peak in zip((student_logits, teacher_logits), peaks, strict=True)
    ]
    write_stats(of_rows, *tokens, stats)
    (peak_s, peak_t), total_s, total_t = peaks[:, :, 0], of_rows.total_s, of_rows.total_t
    return stats, torch.stack([peak_s, total_s.log(), peak_t, total_t.log()])


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

    p (g_kl (log p - log q - KL) - g_H (log p + H) - g_logprob), and + g_logprob at the token, where p = exps / total,
    log p = s - log_total and log q = t - log_total, each model's own.
    """
    peak_s, log_total_s, peak_t, log_total_t = normalisers[:, :, None]
    of_logprob, of_kl, of_entropy = (upstream[field, :, None] / temperature for field in (0, 3, 4))
    kl, entropy = stats[3, :, None], stats[4, :, None]
    of_kl, kl = of_kl.masked_fill(kl == math.inf, 0), kl.masked_fill(kl == math.inf, 0)
    with_entropy, with_logprob = of_entropy.any(), of_logprob.any()
    level, one_over_total = log_total_s - log_total_t + kl, (-log_total_s).exp()
    for part, (s, t, exps) in row_slices(student_logits, stats.dtype):
        shift(_tempered(student_logits[part], temperature, s), peak_s[part], s)
        shift(_tempered(teacher_logits[part], temperature, t), peak_t[part], t)
        exponentials(s, exps)
        work = torch.sub(s, t, out=t).sub_(level[part])
        if not with_entropy and not with_logprob:
            _multiply(work.mul_(of_kl[part] * one_over_total[part]), exps, gradient[part])
            continue
        work.mul_(of_kl[part])
        work.addcmul_(s.add_(entropy[part] - log_total_s[part]), of_entropy[part], value=-1)
        work.sub_(of_logprob[part]).mul_(exps).mul_(one_over_total[part])
        gradient[part] = work.scatter_add_(1, token_ids[part, None], of_logprob[part])


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a * b, rounded once to the dtype of out."""
    if out.dtype == a.dtype:
        torch.mul(a, b, out=out)
    else:
        out.copy_(a.mul_(b))


def _tempered(logits: Tensor, temperature: float, buffer: Tensor) -> Tensor:
    """logits / temperature, in `buffer` and its dtype unless they are as they should be."""
    return logits if temperature == 1 else buffer.copy_(logits).div_(temperature)
