"""The fused head of a student whose teacher is known by its numbers alone, against float64 and against PyTorch."""

import math

import pytest
import torch
from kernels_common import assert_as_good_as_pytorch, exact, over_implementations, running
from kernels_linear import TENSORS, compare, make, run

from distill_kernels import TokenStats, linear_distill_loss, linear_reverse_kl, reference

UNKNOWN = {"reverse_kl", "teacher_entropy"}


def alone(K, Vs, H, *, device, **options) -> dict:
    """Arguments with a teacher elsewhere."""
    arguments = make(K, Vs, Vs, H, 4, device=device, **options)
    said = -5 * torch.rand(2 * K, device=device)[::2]
    return arguments | {"teacher_hidden": None, "teacher_weight": None, "teacher_logprob": said}


@over_implementations
@pytest.mark.parametrize(("K", "V"), [(0, 7), (1, 1), (7, 1000), (50, 7), (2, 5003), (1, 151_936)])
def test_sizes(implementation, K, V):
    """The workspace holds a few rows, so that there are several chunks and a ragged last one."""
    torch.manual_seed(0)
    with running(implementation, block={7: 8, 1000: 512, 5003: 2048}.get(V, 65_536)) as device:
        _, stats, _ = compare(alone(K, V, 12, device=device), workspace_bytes=3 * 8 * V)
        assert {name for name, values in stats._asdict().items() if values.isnan().any()} == (UNKNOWN if K else set())


@over_implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(implementation, dtype):
    torch.manual_seed(1)
    with running(implementation) as device:
        compare(alone(48, 300, 16, device=device, dtype=dtype), temperature=0.7)


@over_implementations
def test_all_options(implementation):
    torch.manual_seed(2)
    with running(implementation) as device:
        arguments = alone(5, 310, 16, device=device, ids_below=301)
        arguments["token_ids"][:3] = torch.tensor([0, 300, 300])
        arguments["token_weight"][1] = 0
        _, _, gradients = compare(
            arguments,
            vocab_size=301,
            temperature=2.0,
            student_bias=torch.randn(310, device=device, requires_grad=True),
            student_softcap=4.0,
            student_scale=0.8,
            sampling_logprob=-4 * torch.rand(5, device=device),
            importance_clip=1.5,
            task_advantage=3 * torch.randn(5, device=device),
            workspace_bytes=3 * 8 * 310,
        )
        assert not gradients["student_weight"][301:].any()
        assert not gradients["student_hidden"][1].any()


@over_implementations
@pytest.mark.parametrize("frozen", [True, False])
def test_it_is_the_loss_of_a_teacher_that_is_here(implementation, frozen):
    """What the teacher would say of the tokens gives the same loss, gradients, and statistics where they are known."""
    torch.manual_seed(3)
    with running(implementation) as device:
        arguments = make(7, 300, 300, 16, 24, device=device)
        arguments["student_weight"].requires_grad_(not frozen)
        loss, stats, gradients = run(linear_distill_loss, arguments, 1.7)
        nothing = {"teacher_hidden": None, "teacher_weight": None, "teacher_logprob": stats.teacher_logprob}
        other, found, others = run(linear_distill_loss, arguments | nothing, 1.7)
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(others, gradients)
        for name in set(TokenStats._fields) - UNKNOWN:
            torch.testing.assert_close(getattr(found, name), getattr(stats, name))


@over_implementations
def test_cross_entropy(implementation):
    """An advantage of 1 and nothing said of the teacher: the weighted cross entropy of the tokens."""
    torch.manual_seed(4)
    with running(implementation) as device:
        arguments = alone(9, 200, 16, device=device) | {"teacher_logprob": None}
        advantage = torch.ones(9, device=device)
        loss, stats, gradients = run(linear_distill_loss, arguments, 1.0, advantage=advantage)
        hidden, weight = (exact(arguments[name]) for name in ("student_hidden", "student_weight"))
        losses = torch.nn.functional.cross_entropy(hidden @ weight.T, arguments["token_ids"].cpu(), reduction="none")
        truth = (losses * arguments["token_weight"].cpu()).sum()
        torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-5, atol=1e-6)
        for found, right in zip(gradients.values(), torch.autograd.grad(truth, (hidden, weight)), strict=True):
            torch.testing.assert_close(found.cpu().double(), right, rtol=1e-5, atol=1e-6)
        assert stats.reward.isnan().all()
        assert stats.teacher_logprob.isnan().all()


@over_implementations
def test_tokens_of_probability_zero(implementation):
    """Impossible for both models, for the teacher alone, for the student alone."""
    torch.manual_seed(5)
    with running(implementation) as device:
        arguments = alone(4, 50, 8, device=device)
        bias = torch.zeros(50, device=device)
        bias[[1, 3]] = -math.inf
        arguments["token_ids"][:] = torch.tensor([1, 2, 3, 4])
        arguments["teacher_logprob"][:2] = -math.inf
        for row in range(4):  # one at a time: the losses of two rows are infinite, with opposite signs
            arguments["token_weight"] = torch.eye(4, device=device)[row]
            loss, stats, gradients = compare(arguments, student_bias=bias)
            assert loss.isinf() == (row in (1, 2))
            assert stats.reward[0] == 0
            assert all(gradient.isfinite().all() for gradient in gradients.values())


@over_implementations
def test_scoring(implementation):
    """`linear_reverse_kl` gives the statistics of the loss, in chunks, and carries no gradient."""
    torch.manual_seed(6)
    with running(implementation) as device:
        arguments = alone(7, 120, 8, device=device, ids_below=100)
        values = [arguments[name] for name in TENSORS[:5]]
        options = {"vocab_size": 100, "temperature": 0.7, "student_softcap": 5.0}
        said = arguments["teacher_logprob"]
        ours = linear_reverse_kl(*values, workspace_bytes=2000, teacher_logprob=said, **options)
        on_cpu = [value if value is None else value.detach().cpu() for value in values]
        same = reference.linear_reverse_kl(*on_cpu, teacher_logprob=said.cpu(), **options)
        for name in TokenStats._fields:
            found, right = getattr(ours, name), getattr(same, name)
            assert not found.requires_grad
            if name in UNKNOWN:
                assert found.isnan().all()
            else:
                assert_as_good_as_pytorch(found, right, right.double(), name, constant=5e-6)


def test_gradients_of_the_twin_in_float64():
    """Every option that bends them, against the reference's autograd."""
    torch.manual_seed(7)
    double = {"dtype": torch.float64}
    leaves = [torch.randn(*shape, **double).requires_grad_() for shape in ((3, 4), (11, 4), (11,))]
    token_ids, token_weight, said = torch.tensor([0, 10, 4]), torch.rand(3, **double), -torch.rand(3, **double)

    def gradients(function):
        loss, _ = function(
            leaves[0], leaves[1], None, None, token_ids, token_weight, teacher_logprob=said, student_bias=leaves[2],
            temperature=0.7, student_softcap=3.0, student_scale=1.2,
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves)

    for found, right in zip(gradients(linear_distill_loss), gradients(reference.linear_distill_loss), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)
