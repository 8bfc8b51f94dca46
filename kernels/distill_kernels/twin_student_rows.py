"""Row function of a student alone in PyTorch: what `triton_student_rows` does for CUDA, for tensors on a CPU."""

import math

import torch
from torch import Tensor

from distill_kernels.twin_rows import at_tokens, row_slices, sampled_gradient, sampled_loss, softcap_slope, softmax_of
from distill_kernels.types import Head


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
    """Statistics [6, k], losses [k] and the gradient of k rows of raw logits [k, V], which it overwrites.

    The gradient of row k's loss with respect to its tempered logits is row_scale[k] * grad[k]. `grad` may be `logits`
    itself, or None. `token_weight` [k] goes into the factor. `lost` [k] becomes 0, as nothing is rounded here.
    """
    stats.fill_(math.nan)
    if teacher_logprob is not None:
        stats[1] = teacher_logprob
    for part, (exps,) in row_slices(logits, buffers=1):
        softmax = softmax_of(logits[part], exps, head, temperature)
        own = torch.linalg.vecdot(exps, softmax.shifted) / softmax.total[:, 0]
        log_total = softmax.log_total[:, 0]
        logprob = torch.sub(at_tokens(softmax.shifted, token_ids[part]), log_total, out=stats[0, part])
        impossible = (logprob == -math.inf) & (stats[1, part] == -math.inf)
        stats[2, part] = (stats[1, part] - logprob).masked_fill_(impossible, 0)
        stats[4, part] = log_total - own
        credit = stats[2, part] if advantage is None else advantage[part].to(stats.dtype)
        credit = credit if task_advantage is None else credit + task_advantage[part].to(stats.dtype)
        at_sampling = None if sampling_logprob is None else sampling_logprob[part]
        losses[part], row_scale[part] = sampled_loss(logprob, credit, at_sampling, importance_clip)
        if grad is None:
            continue
        slope = softcap_slope(softmax, head, temperature)
        gradient = sampled_gradient(softmax, token_ids[part], grad[part])
        if slope is not None:
            gradient.mul_(slope)
    if token_weight is not None:
        row_scale *= token_weight
    if lost is not None:
        lost.zero_()
