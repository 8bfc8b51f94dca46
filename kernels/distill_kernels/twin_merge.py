"""The merge of two attentions over different keys in PyTorch: for CPUs, and whatever has no flash kernel."""

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds a second set of keys to attention over a first, in place: out [M, h, d], lse [M, h] float32 or better."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    out.copy_(torch.lerp(out.to(share.dtype), other_out.to(share.dtype), share))
    torch.logaddexp(lse, other_lse, out=lse)
