"""The student's product with the gradient in its epilogue: what `test_kernels_linear.py` does not reach of it.

Those comparisons run through it too, as `interpreted_product` and, on Hopper in bfloat16, as `cuda`.
"""

import math

import pytest
import torch
from kernels_common import INTERPRETING, assert_as_good_as_pytorch, running
from kernels_linear import TENSORS, compare, make

from distill_kernels import backend, linear_distill_loss, student_product
from distill_kernels.types import Head

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
over_products = pytest.mark.parametrize(
    "implementation",
    [
        *(["interpreted_product"] if INTERPRETING else []),
        *([pytest.param("cuda", marks=pytest.mark.cuda)] if HOPPER else []),
    ],
)


def dtype_of(implementation) -> torch.dtype:
    """In which the product is taken: the interpreter's bfloat16 product is broken."""
    return torch.bfloat16 if implementation == "cuda" else torch.float32


@pytest.fixture
def launches(monkeypatch):
    """One entry for each chunk that went through the product."""
    from distill_kernels import triton_student_product

    seen, ordinary = [], triton_student_product.distill_product

    def counted(*args, **options):
        seen.append(len(args[0]))
        return ordinary(*args, **options)

    monkeypatch.setattr(triton_student_product, "distill_product", counted)
    return seen


@over_products
def test_all_options(implementation, launches):
    """Several chunks; Vs differs from Vt, scales, a temperature, weights of 0, an advantage and a truncated importance
    ratio."""
    torch.manual_seed(0)
    with running(implementation) as device:
        arguments = make(45, 310, 305, 40, 24, device=device, dtype=dtype_of(implementation), ids_below=301)
        arguments["token_ids"][:3] = torch.tensor([0, 300, 300])
        arguments["token_weight"][1] = 0
        _, _, gradients = compare(
            arguments,
            vocab_size=301,
            sampling_logprob=-4 * torch.rand(45, device=device),
            importance_clip=1.5,
            advantage=torch.randn(90, device=device)[::2],
            temperature=2.0,
            student_scale=0.8,
            teacher_scale=1.3,
            workspace_bytes=20 * 320 * 13,
        )
        assert sum(launches) == 45
        assert len(launches) >= 2
        assert not gradients["student_weight"][301:].any()
        assert not gradients["student_hidden"][1].any()


@over_products
def test_as_the_row_kernel(implementation, launches):
    """The tiles as they are on a GPU, a ragged last one each way, against the other way of the same op."""
    torch.manual_seed(1)
    with running(implementation) as device:
        from distill_kernels import triton_student_product as product

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(product, "TILE", product.Tile(128, 256, 64, 3, 8))
            arguments = make(135, 601, 601, 72, 40, device=device, dtype=dtype_of(implementation))
            ours = compare(arguments)
            assert launches
            patch.setattr(student_product, "STUDENT_PRODUCT", False)
            launches.clear()
            other = compare(arguments)
            assert not launches
    rounding = 8e-3 if implementation == "cuda" else 0.0
    torch.testing.assert_close(ours[0], other[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], other[1], rtol=1e-5, atol=2e-5)
    for name, gradient in ours[2].items():
        difference = (gradient - other[2][name]).double().norm()
        assert difference <= (1e-5 + rounding) * other[2][name].double().norm(), name


@over_products
def test_extremes(implementation, launches):
    """Tokens that are hundreds of nats less probable than others, in one model or both, and student logits of 1e4.

    The latter in many rows: they have the largest gradients, of which the op in half precision rounds the hidden states
    times the row's factor, and PyTorch the reward. In few rows luck decides which is the larger error.
    """
    torch.manual_seed(2)
    with running(implementation) as device:
        arguments = make(48, 500, 500, 16, 24, device="cpu", dtype=dtype_of(implementation))
        arguments["student_hidden"].data[:2] *= 60
        arguments["teacher_hidden"][1:3] *= 60
        arguments["student_hidden"].data[3:43] *= 2e3
        for model, row in (("student", 0), ("student", 1), ("teacher", 2)):
            logits = arguments[f"{model}_hidden"][row].float() @ arguments[f"{model}_weight"].float().T
            arguments["token_ids"][row] = logits.argmin()
        # Drawn on the CPU: the same numbers everywhere.
        arguments = {n: t.detach().to(device).requires_grad_(t.requires_grad) for n, t in arguments.items()}
        _, stats, gradients = compare(arguments)
        assert launches
        assert stats.student_logprob[:2].max() < -300
        assert stats.teacher_logprob[2] < -300
        assert all(gradient.isfinite().all() for gradient in gradients.values())


@over_products
@pytest.mark.parametrize("size", [1.5, 4.0])
def test_half_precision_plane(implementation, size):
    """The gradient in the logits as half precision leaves it, for flat and peaked rows and a token out of range. The
    interpreter cuts bfloat16 off instead of rounding it; there it is float16."""
    torch.manual_seed(3)
    k, V, H = 20, 600, 32
    half = torch.bfloat16 if implementation == "cuda" else torch.float16
    with running(implementation) as device:
        module = backend.implementation("student_product", device)
        hidden = torch.randn(k, H, device=device).to(dtype_of(implementation))
        weight = (torch.randn(V, H, device=device) * (size / H**0.5)).to(dtype_of(implementation))
        logits = hidden.double() @ weight.double().T
        teacher = torch.empty(k, 640, device=device)[:, :V].copy_(logits + torch.randn_like(logits))
        grad = torch.empty(k, 640, device=device, dtype=half)[:, :V]
        token_ids = logits.softmax(1).multinomial(1)[:, 0]
        token_ids[4] = V
        stats, losses, row_scale = torch.empty(6, k, device=device), *torch.empty(2, k, device=device)
        module.distill_product(
            hidden, weight, teacher, module.scratch(k, V, device), token_ids, None, stats, losses, row_scale, grad,
            advantage=torch.ones(k, device=device), importance_clip=None, temperature=1.0,
            student_head=Head(None, None, 1.0), teacher_head=Head(None, None, 1.0),
        )  # fmt: skip
    valid = torch.arange(k, device=device) != 4
    assert stats[:3, 4].isnan().all()
    assert stats[:, valid].isfinite().all()
    p, q, token_ids = logits[valid].log_softmax(1), teacher[valid].double().log_softmax(1), token_ids[valid, None]
    plane, ours = grad[valid].double(), grad[valid].double() * row_scale[valid, None].double()
    # An entry of E is rounded once: by half of a unit in the last place, which is eps / 2 of a number just above a
    # power of two. float32 adds its error in x, whose roundings are 1e-6 each below 32 bits. float16 ends at 6e-5.
    E, rounding, arithmetic = (p - p.gather(1, token_ids)).exp(), torch.finfo(half).eps / 2, 1e-5
    error = ((plane - E) / E).abs().scatter(1, token_ids, 0)
    assert error[plane > 1e-4].max() <= rounding + arithmetic
    # The token's entry is exact; all others share the correction that makes it so.
    truth = p.exp().scatter_add(1, token_ids, -torch.ones_like(p))
    error = (ours - truth).abs()
    assert error.gather(1, token_ids).max() <= arithmetic
    assert (error <= (2 * rounding + arithmetic) * truth.abs() + arithmetic * truth.abs().amax(1, keepdim=True)).all()
    assert_as_good_as_pytorch(stats[1, valid], q.float().gather(1, token_ids)[:, 0], q.gather(1, token_ids)[:, 0], "q")


@over_products
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_end(implementation, bad, launches):
    """They give NaN in their own row, and nothing waits for ever."""
    torch.manual_seed(4)
    with running(implementation) as device:
        arguments = make(4, 300, 300, 16, 24, device=device, dtype=dtype_of(implementation))
        arguments["student_hidden"].data[1, 3] = bad
        arguments["teacher_hidden"][2, 3] = bad
        _, stats = linear_distill_loss(*(arguments[name] for name in TENSORS))
    assert launches
    assert stats.student_entropy[[0, 2, 3]].isfinite().all()
    assert stats.reverse_kl[[1, 2]].isnan().all()
    assert stats.reverse_kl[[0, 3]].isfinite().all()


@over_products
def test_registration(implementation):
    """As PyTorch's own checker of custom ops sees it."""
    with running(implementation) as device:
        arguments = make(3, 40, 40, 16, 24, device=device, dtype=dtype_of(implementation))
        hidden, weight, teacher_hidden, teacher_weight, *of_rows = (arguments[name] for name in TENSORS)
        options = (None, None, None, [True, True, False], 0, None, 0.5, 1.0, 40, None, None, 1.0, 1.0, None, False)
        values = (hidden, weight, None, teacher_hidden, teacher_weight, None, *of_rows, *options)
        torch.library.opcheck(torch.ops.distill_kernels.linear_distill_loss.default, values)
