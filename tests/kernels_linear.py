"""What the tests of the fused head share: arguments, a call with its gradients, and the comparison with float64."""

import torch
from kernels_common import assert_as_good_as_pytorch, exact

from distill_kernels import TokenStats, TopTokens, linear_distill_loss, reference

TENSORS = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "token_ids", "token_weight")
TRAINED = ("student_hidden", "student_weight", "student_bias")


def make(K, Vs, Vt, Hs, Ht, *, device, dtype=torch.float32, teacher_dtype=None, ids_below=None) -> dict:
    """Random arguments; logits of some nats in size."""
    teacher_dtype = teacher_dtype or dtype
    return {
        "student_hidden": torch.randn(K, Hs, device=device).to(dtype).requires_grad_(),
        "student_weight": (torch.randn(Vs, Hs, device=device) * (3 / Hs**0.5)).to(dtype).requires_grad_(),
        "teacher_hidden": torch.randn(K, Ht, device=device).to(teacher_dtype),
        "teacher_weight": (torch.randn(Vt, Ht, device=device) * (3 / Ht**0.5)).to(teacher_dtype),
        "token_ids": torch.randint(ids_below or min(Vs, Vt), (K,), device=device),
        "token_weight": torch.rand(K, device=device),
    }


def run(function, arguments, upstream, **options):
    """Loss, statistics and the gradients of upstream * loss to the trained tensors present."""
    named = arguments | options
    positional = [named.pop(name) for name in TENSORS]
    loss, stats = function(*positional, **named)
    leaves = {name: (arguments | options)[name] for name in TRAINED if (arguments | options).get(name) is not None}
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = {}
    if trained:
        gradients = dict(zip(trained, torch.autograd.grad(loss * upstream, list(trained.values())), strict=True))
    return loss, stats, gradients


def copied(value, convert):
    """An argument on the CPU, what is a float by `convert`."""
    if isinstance(value, TopTokens):
        return TopTokens(*(each.cpu() for each in value))
    if not isinstance(value, torch.Tensor):
        return value
    return convert(value) if value.is_floating_point() else value.cpu()


def compare(arguments, upstream=1.7, workspace_bytes=None, **options):
    """Everything against float64 and against PyTorch in the same dtype."""
    copies = []
    for convert in (lambda t: t.detach().cpu().clone().requires_grad_(t.requires_grad), exact):
        copies.append({name: copied(value, convert) for name, value in (arguments | options).items()})
    ours = run(linear_distill_loss, arguments, upstream, workspace_bytes=workspace_bytes, **options)
    same = run(reference.linear_distill_loss, copies[0], upstream)
    truth = run(reference.linear_distill_loss, copies[1], upstream)
    assert ours[0].dtype == torch.float32
    assert_as_good_as_pytorch(ours[0], same[0], truth[0], "loss", constant=5e-6)
    for name in TokenStats._fields:
        statistic, right = getattr(ours[1], name), getattr(truth[1], name)
        assert not statistic.requires_grad
        if right.isnan().any():
            assert statistic.isnan().all(), f"{name} is not known"
            continue
        assert_as_good_as_pytorch(statistic, getattr(same[1], name), right, name, constant=5e-6)
    assert ours[2].keys() == truth[2].keys()
    for name, gradient in ours[2].items():
        assert gradient.dtype == (arguments | options)[name].dtype
        assert_as_good_as_pytorch(gradient, same[2][name], truth[2][name], f"gradient of {name}", constant=5e-6)
    return ours
