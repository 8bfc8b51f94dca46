"""What the loss gives the fused head, and what comes back."""

import torch
from torch import nn

from distill.loss import HeadPair, ModelParts
from distill.models import Head


def test_master_weights_get_their_gradient_unrounded():
    """Float32 weights of a student that computes in bfloat16: more bits than bfloat16 has reach them."""
    torch.manual_seed(0)
    parts = [
        ModelParts(nn.Identity(), Head(nn.Parameter(torch.randn(50, 16)), None, None, 1.0), torch.bfloat16)
        for _ in range(2)
    ]
    heads = HeadPair(*parts, temperature=1.0, vocab_size=None)
    hidden = torch.randn(2, 9, 16).bfloat16()
    loss, _ = heads.loss(*hidden, torch.randint(50, (9,)), torch.ones(9), objective="reverse_kl")
    loss.backward()
    gradient = parts[0].head.weight.grad
    assert gradient.dtype == torch.float32
    assert (gradient.bfloat16() != gradient).float().mean() > 0.9
    assert parts[1].head.weight.grad is None
