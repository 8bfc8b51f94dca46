"""Row functions of what a teacher's likeliest tokens leave, in PyTorch: what `triton_rest_rows` does for CUDA."""

import torch
from torch import Tensor

from distill_kernels.twin_rows import exponentials, row_slices, shifted_softmax, tempered
from distill_kernels.types import Head


def rest_sums(logits: Tensor, head: Head, temperature: float) -> Tensor:
    """[3, r] of r rows of raw logits [r, V], which become tempered ones: with x these, the largest m, sum e^(x - m),
    sum (x - m) e^(x - m); columns of -inf count for nothing."""
    found = logits.new_empty(3, len(logits))
    for part, (shifted, exps) in row_slices(logits, buffers=2):
        softmax = shifted_softmax(tempered(logits[part], head, temperature), shifted, exps)
        found[0, part], found[1, part] = softmax.peak[:, 0], softmax.total[:, 0]
        found[2, part] = torch.linalg.vecdot(exps, shifted)
    return found


def rest_gradient(
    logits: Tensor, log_total: Tensor, coefficient: Tensor, grad: Tensor, head: Head, temperature: float
) -> None:
    """grad [r, V] = coefficient e^(x - log_total) and the softcap's slope; `logits` as `rest_sums` left them, which may
    be `grad`."""
    for part, (shifted, exps) in row_slices(logits, buffers=2):
        x = logits[part]
        torch.sub(x, log_total[part, None].clamp(min=torch.finfo(x.dtype).min), out=shifted)
        exponentials(shifted, exps).mul_(coefficient[part, None])
        if head.softcap is not None:
            exps.mul_(torch.mul(x, temperature / head.softcap, out=shifted).square_().neg_().add_(1))
        grad[part] = exps
