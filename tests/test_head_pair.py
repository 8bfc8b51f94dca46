"""What the loss gives the fused head, and what comes back."""

import torch
from torch import nn

from distill.loss import HeadPair, ModelParts
from distill.models import Head


class Elsewhere(ModelParts):
    """A teacher that scores the sampled tokens only."""

    width = 1

    def named(self, hidden):
        return None


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


def test_a_teacher_elsewhere_says_what_one_here_computes():
    """Of the sampled tokens, [K, 1]: the same loss, gradient and reward, and NaN for what nobody says."""
    torch.manual_seed(1)
    here = [
        ModelParts(nn.Identity(), Head(nn.Parameter(torch.randn(50, 16)), None, None, 1.0), torch.float32)
        for _ in range(2)
    ]
    hidden, ids, weights = torch.randn(2, 9, 16), torch.randint(50, (9,)), torch.rand(9)
    said = here[1].head.logits(hidden[1]).log_softmax(-1).gather(1, ids[:, None]).detach()
    losses = []
    for teacher, theirs in ((here[1], hidden[1]), (Elsewhere(nn.Identity(), None, torch.float32), said)):
        heads = HeadPair(here[0], teacher, temperature=1.0, vocab_size=None)
        loss, stats = heads.loss(hidden[0], theirs, ids, weights)
        (gradient,) = torch.autograd.grad(loss, here[0].head.weight)
        scored = heads.statistics(hidden[0], theirs, ids)
        losses.append((loss, gradient, stats.reward, scored.reward, scored.student_entropy))
    torch.testing.assert_close(*losses)
    assert stats.reverse_kl.isnan().all()
    assert scored.teacher_entropy.isnan().all()
    assert heads.agreement(hidden[0], said).isnan().all()
    assert heads.theirs({}, 0, torch.tensor([0]), hidden[0]).shape == (9, 1)
