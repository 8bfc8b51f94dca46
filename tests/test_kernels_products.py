"""The products of the linear ops where a CPU has none of the kind: CUDA's half-precision ones, emulated."""

import pytest
import torch
from kernels_common import exact, over_implementations, running, tensor_cores
from kernels_linear import TENSORS, make, run
from test_kernels_linear import over_objectives

from distill_kernels import linear_distill_loss, linear_reverse_kl, reference


@over_implementations
@over_objectives
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [0, 7])
def test_products_of_tensor_cores(implementation, objective, dtype, K):
    """Against the CPU's own: several chunks, a bias with factors of many magnitudes, columns past the shared ones."""
    if implementation == "cuda" or (implementation == "twin" and objective == "sampled_reverse_kl"):
        pytest.skip("CUDA has its own; the twin's gradient of this objective is float32")
    torch.manual_seed(13)
    with running(implementation) as device:
        arguments = make(K, 310, 300, 16, 24, device=device, dtype=dtype)
        arguments["token_weight"] *= 10.0 ** -torch.arange(K)
        arguments["student_bias"] = torch.randn(310, requires_grad=True)
        options = {"objective": objective, "vocab_size": 297, "student_softcap": 5.0}
        _, _, truth = run(linear_distill_loss, arguments, 1.7, **options)
        with tensor_cores():
            _, _, gradients = run(linear_distill_loss, arguments, 1.7, workspace_bytes=3 * 10 * 320, **options)
    assert not gradients["student_weight"][297:].any()
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype
        difference = (gradient - truth[name]).double().norm()
        assert difference <= 1e-2 * truth[name].double().norm(), name


@over_implementations
@over_objectives
def test_a_row_s_gradient_is_rounded_once(implementation, objective):
    """What it is multiplied with is not rounded again on its way into the weight's: an entry of one row's gradient is
    half a unit in the last place of float16 off, 2^-11, and no more."""
    if implementation != "interpreted":
        pytest.skip("the twin's gradient is float32; of CUDA, test_kernels_linear.py compares with PyTorch")
    torch.manual_seed(3)
    with running(implementation) as device:
        arguments = make(1, 90, 90, 16, 24, device=device, dtype=torch.float16)
        arguments["student_weight"] = arguments["student_weight"].detach().float().requires_grad_()
        arguments["teacher_weight"] = arguments["teacher_weight"].float()
        floats = {name: exact(tensor) if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}
        _, _, truth = run(reference.linear_distill_loss, floats, 1.0, objective=objective)
        with tensor_cores():
            _, _, gradients = run(linear_distill_loss, arguments, 1.0, objective=objective, cast_weights=True)
    found, wanted = gradients["student_weight"].double(), truth["student_weight"]
    large = wanted.abs() > 1e-2 * wanted.abs().max()
    assert ((found - wanted) / wanted)[large].abs().max() < 2**-11 * 1.02


@over_implementations
def test_cast_weights(implementation):
    """Float32 weights in the hidden states' dtype: the same numbers as of cast ones, and a gradient in float32."""
    torch.manual_seed(15)
    with running(implementation) as device:
        arguments = make(7, 90, 90, 16, 24, device=device, dtype=torch.bfloat16)
        master = torch.randn(90, 16, device=device, requires_grad=True)
        teacher = torch.randn(90, 24, device=device)
        casts = {"student_weight": master.detach().bfloat16().requires_grad_(), "teacher_weight": teacher.bfloat16()}
        options = {"objective": "reverse_kl", "workspace_bytes": 3 * 12 * 128}
        loss, stats, rounded = run(linear_distill_loss, arguments | casts, 1.7, **options)
        floats = arguments | {"student_weight": master, "teacher_weight": teacher}
        same_loss, same_stats, gradients = run(linear_distill_loss, floats, 1.7, cast_weights=True, **options)
        assert torch.equal(loss, same_loss)
        assert all(torch.equal(a, b) for a, b in zip(stats, same_stats, strict=True))
        assert torch.equal(gradients["student_hidden"], rounded["student_hidden"])
        gradient = gradients["student_weight"]
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.bfloat16(), rounded["student_weight"])
        assert (gradient.bfloat16() != gradient).float().mean() > 0.9
        scored = [floats[name] for name in TENSORS[:5]]
        own = linear_reverse_kl(*scored, cast_weights=True, workspace_bytes=3 * 8 * 128)
        torch.testing.assert_close(own.reverse_kl, stats.reverse_kl)


def test_cast_weights_of_float32_changes_nothing():
    torch.manual_seed(16)
    arguments = make(7, 90, 90, 16, 24, device="cpu")
    plain = run(linear_distill_loss, arguments, 1.7)
    cast = run(linear_distill_loss, arguments, 1.7, cast_weights=True)
    assert torch.equal(plain[0], cast[0])
    assert all(torch.equal(plain[2][name], gradient) for name, gradient in cast[2].items())


def test_upstream_gradient_that_is_differentiated():
    """The gradient is linear in the upstream one, which may itself want a gradient."""
    torch.manual_seed(14)
    arguments = make(3, 40, 40, 8, 8, device="cpu", dtype=torch.bfloat16)
    weight = arguments["student_weight"]
    upstream = torch.tensor(1.7, requires_grad=True)
    loss, _ = linear_distill_loss(*arguments.values(), objective="reverse_kl")
    (plain,) = torch.autograd.grad(loss * 1.7, weight, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss * upstream, weight, create_graph=True)
    assert torch.equal(gradient, plain)
    (slope,) = torch.autograd.grad(gradient.double().pow(2).sum(), upstream)
    torch.testing.assert_close(slope.double(), 2 * plain.double().pow(2).sum() / 1.7, rtol=1e-2, atol=0)
