"""`linear_distill_loss` and `linear_reverse_kl` against float64: values and every gradient."""

import math

import pytest
import torch
from kernels_common import assert_as_good_as_pytorch, exact, over_head_implementations, over_implementations, running
from kernels_linear import TENSORS, compare, make

from distill_kernels import TokenStats, linear_distill_loss, linear_reverse_kl, reference
from distill_kernels.types import OBJECTIVES

over_objectives = pytest.mark.parametrize("objective", OBJECTIVES)


@over_head_implementations
@over_objectives
@pytest.mark.parametrize(("K", "V"), [(0, 7), (1, 1), (7, 1000), (130, 7), (2, 5003), (1, 151_936)])
def test_sizes(implementation, objective, K, V):
    """Hs differs from Ht; the workspace holds a few rows, so that there are several chunks and a ragged last one."""
    if implementation.startswith("interpreted") and K == 130 and objective != "reverse_kl":
        pytest.skip("130 rows are slow to interpret, and the loop over chunks is the same for every objective")
    torch.manual_seed(0)
    with running(implementation, block={7: 8, 1000: 512, 5003: 2048}.get(V, 65_536)) as device:
        arguments = make(K, V, V, 12, 20, device=device)
        compare(arguments, objective=objective, workspace_bytes=3 * 12 * V)


@over_head_implementations
@over_objectives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(implementation, objective, dtype):
    """Of enough rows that the largest error is no luck: of three rows, PyTorch's is the smaller one in 1 of 100."""
    torch.manual_seed(1)
    with running(implementation) as device:
        compare(make(48, 300, 300, 16, 24, device=device, dtype=dtype), objective=objective, temperature=0.7)


@over_head_implementations
@over_objectives
def test_all_options(implementation, objective):
    """Vs differs from Vt, bias, softcap, scale, temperature 2, weights of 0, a truncated importance ratio."""
    torch.manual_seed(2)
    with running(implementation) as device:
        arguments = make(5, 310, 305, 16, 24, device=device, ids_below=301)
        arguments["token_ids"][:3] = torch.tensor([0, 300, 300])
        arguments["token_weight"][1] = 0
        sampled = {"sampling_logprob": -4 * torch.rand(5, device=device), "importance_clip": 1.5}
        _, _, gradients = compare(
            arguments,
            objective=objective,
            vocab_size=301,
            temperature=2.0,
            beta=0.3,
            student_bias=torch.randn(310, device=device, requires_grad=True),
            teacher_bias=torch.randn(305, device=device),
            student_softcap=4.0,
            teacher_softcap=6.0,
            student_scale=0.8,
            teacher_scale=1.3,
            **(sampled if objective == "sampled_reverse_kl" else {}),
        )
        assert not gradients["student_weight"][301:].any()
        assert not gradients["student_hidden"][1].any()


@over_implementations
@over_objectives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tasks_advantage_is_a_sampled_term_of_any_objective(implementation, objective, dtype):
    """With and without a ratio, a softcap; in several chunks; a token of weight 0, one that the teacher excludes."""
    torch.manual_seed(5)
    with running(implementation) as device:
        arguments = make(32, 200, 200, 16, 24, device=device, dtype=dtype)
        arguments["token_weight"][1] = 0
        task = {"task_advantage": 3 * torch.randn(32, device=device), "objective": objective, "beta": 0.3}
        ratio = {"sampling_logprob": -4 * torch.rand(32, device=device), "importance_clip": 1.5}
        compare(arguments, workspace_bytes=3 * 1600, **task)
        loss, _, gradients = compare(arguments, student_softcap=4.0, temperature=1.3, **task, **ratio)
        without = compare(arguments, student_softcap=4.0, temperature=1.3, objective=objective, beta=0.3)
        assert (loss - without[0]).abs() > 0.1
        assert (gradients["student_hidden"] - without[2]["student_hidden"]).abs().max() > 0.01
        if dtype == torch.float32:
            bias = torch.zeros(200, device=device)
            bias[int(arguments["token_ids"][2])] = -math.inf
            loss, _, gradients = compare(arguments, teacher_bias=bias, **task)
            assert all(gradient.isfinite().all() for gradient in gradients.values())


@over_head_implementations
@over_objectives
def test_extreme_and_impossible_columns(implementation, objective):
    """Logits of 1e4 in size, and biases of -inf in both models, in the student alone and in the teacher alone."""
    torch.manual_seed(3)
    with running(implementation) as device:
        arguments = make(4, 200, 200, 8, 8, device=device)
        arguments["student_hidden"].data[0] *= 2e3
        arguments["teacher_hidden"][1] *= 2e3
        arguments["token_ids"][:] = torch.tensor([4, 5, 6, 100])
        student_bias, teacher_bias = torch.zeros(2, 200, device=device)
        student_bias[20:40] = teacher_bias[20:30] = -math.inf
        loss, stats, gradients = compare(
            arguments, objective=objective, student_bias=student_bias, teacher_bias=teacher_bias
        )
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert loss.isinf() == (objective == "forward_kl")
        teacher_bias[50] = -math.inf
        _, stats, gradients = compare(
            arguments, objective=objective, student_bias=student_bias, teacher_bias=teacher_bias
        )
        assert stats.reverse_kl.isinf().all()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        arguments["token_weight"][:] = 0
        loss, _, gradients = compare(
            arguments, objective=objective, student_bias=student_bias, teacher_bias=teacher_bias
        )
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients.values())


@over_head_implementations
def test_sampled_tokens_of_probability_zero(implementation):
    """Impossible in both models, in the teacher alone, in the student alone (with the ratio, which is then 0)."""
    torch.manual_seed(4)
    with running(implementation) as device:
        arguments = make(4, 50, 50, 8, 8, device=device)
        student_bias, teacher_bias = torch.zeros(2, 50, device=device)
        student_bias[[1, 3]] = teacher_bias[[1, 2]] = -math.inf
        arguments["token_ids"][:] = torch.tensor([1, 2, 3, 4])
        biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
        for ratio in ({}, {"sampling_logprob": -torch.ones(4, device=device)}):
            for row in range(4):  # one at a time: the losses of two rows are infinite, with opposite signs
                arguments["token_weight"] = torch.eye(4, device=device)[row]
                loss, _, gradients = compare(arguments, **biases, **ratio)
                assert loss.isinf() == (row == 1 or (row == 2 and not ratio))
                assert all(gradient.isfinite().all() for gradient in gradients.values())


@over_head_implementations
@pytest.mark.parametrize("ratio", [False, True])
def test_advantage(implementation, ratio):
    """What the caller gives takes the reward's place in loss and gradient, over several chunks; statistics stay."""
    torch.manual_seed(12)
    with running(implementation) as device:
        arguments = make(7, 300, 300, 8, 12, device=device)
        options = {"sampling_logprob": -4 * torch.rand(7, device=device), "importance_clip": 1.5} if ratio else {}
        own, stats, gradients = compare(arguments, workspace_bytes=3 * 8 * 300, **options)
        given = 3 * torch.randn(14, device=device)[::2]
        given[2] = 0
        other, same_stats, others = compare(arguments, workspace_bytes=3 * 8 * 300, advantage=given, **options)
        assert own != other
        assert all(torch.equal(a, b) for a, b in zip(stats, same_stats, strict=True))
        assert not others["student_hidden"][2].any()
        assert gradients["student_hidden"][2].any()
        # The reward itself as the advantage changes nothing.
        again, _, same = compare(arguments, workspace_bytes=3 * 8 * 300, advantage=stats.reward, **options)
        torch.testing.assert_close(again, own)
        torch.testing.assert_close(same, gradients)


@over_head_implementations
def test_strides(implementation):
    torch.manual_seed(5)
    with running(implementation) as device:
        arguments = make(6, 90, 90, 8, 12, device=device)
        arguments["student_hidden"] = torch.randn(8, 6, device=device).T.requires_grad_()
        arguments["student_weight"] = torch.randn(90, 16, device=device)[:, ::2].requires_grad_()
        arguments["teacher_weight"] = torch.randn(12, 90, device=device).T
        arguments["token_weight"] = torch.rand(1, device=device).expand(6)
        compare(arguments, objective="reverse_kl", workspace_bytes=3000)


@over_head_implementations
def test_frozen_weights(implementation):
    """A frozen head gets no gradient and its hidden states do; without any gradient the values stay the same."""
    torch.manual_seed(6)
    with running(implementation) as device:
        arguments = make(3, 40, 40, 8, 8, device=device)
        arguments["student_weight"].requires_grad_(False)
        loss, _, gradients = compare(arguments, objective="jsd")
        assert gradients.keys() == {"student_hidden"}
        with torch.no_grad():
            values = [arguments[name] for name in TENSORS]
            silent, _ = linear_distill_loss(*values, objective="jsd")
        assert not silent.requires_grad
        torch.testing.assert_close(silent, loss.detach())
        arguments["student_weight"].requires_grad_(True)
        arguments["student_hidden"] = arguments["student_hidden"].detach()
        _, _, gradients = compare(arguments, objective="jsd")
        assert gradients.keys() == {"student_weight"}


@over_head_implementations
def test_tied_weights(implementation):
    """The gradient of a weight that is also the embedding is the sum of both uses, and nothing writes to .grad."""
    torch.manual_seed(7)
    with running(implementation) as device:
        arguments = make(5, 60, 60, 8, 8, device=device)
        embedding = arguments["student_weight"]
        inputs = torch.randint(60, (5,), device=device)
        rest = [arguments[name] for name in TENSORS[2:]]
        loss, _ = linear_distill_loss(embedding[inputs].tanh(), embedding, *rest, objective="reverse_kl")
        assert embedding.grad is None
        loss.backward()
        tied = exact(embedding)
        truth, _ = reference.linear_distill_loss(
            tied[inputs.cpu()].tanh(), tied, *(exact(t) if t.is_floating_point() else t.cpu() for t in rest),
            objective="reverse_kl",
        )  # fmt: skip
        truth.backward()
        torch.testing.assert_close(embedding.grad.cpu().double(), tied.grad, rtol=1e-5, atol=1e-6)
        # A second backward pass through the same graph adds the same gradient again.
        loss, _ = linear_distill_loss(embedding[inputs].tanh(), embedding, *rest, objective="reverse_kl")
        first = torch.autograd.grad(2 * loss, embedding, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(2 * loss, embedding)[0])


@over_head_implementations
@pytest.mark.parametrize(
    ("hidden", "weight", "teacher"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.bfloat16),
    ],
)
def test_mixed_dtypes(implementation, hidden, weight, teacher):
    """Products run in the wider dtype of their two operands, and each gradient comes back in its tensor's own."""
    torch.manual_seed(8)
    with running(implementation) as device:
        arguments = make(3, 80, 80, 8, 12, device=device, teacher_dtype=teacher)
        arguments["student_hidden"] = arguments["student_hidden"].detach().to(hidden).requires_grad_()
        arguments["student_weight"] = arguments["student_weight"].detach().to(weight).requires_grad_()
        compare(arguments, objective="forward_kl")


@over_head_implementations
def test_scoring(implementation):
    """`linear_reverse_kl` gives the statistics of the loss, in chunks, and carries no gradient."""
    torch.manual_seed(9)
    with running(implementation) as device:
        arguments = make(7, 120, 110, 8, 12, device=device, ids_below=100)
        values = [arguments[name] for name in TENSORS[:5]]
        options = {"vocab_size": 100, "temperature": 0.7, "student_softcap": 5.0, "teacher_scale": 0.5}
        ours = linear_reverse_kl(*values, workspace_bytes=2000, **options)
        same = reference.linear_reverse_kl(*(v.cpu() for v in values), **options)
        truth = reference.linear_reverse_kl(
            *(exact(v) if v.is_floating_point() else v.cpu() for v in values), **options
        )
        for name in TokenStats._fields:
            assert not getattr(ours, name).requires_grad
            assert_as_good_as_pytorch(getattr(ours, name), getattr(same, name), getattr(truth, name), name)
        empty = [value[:0] if name != "student_weight" and name != "teacher_weight" else value
                 for name, value in zip(TENSORS, values, strict=False)]  # fmt: skip
        assert all(field.shape == (0,) for field in linear_reverse_kl(*empty, **options))


@over_objectives
def test_gradcheck(objective):
    """The twin's gradients in float64 against finite differences of the same loss, with every option that bends them.

    The reward and the ratio are constants of the gradient, which finite differences would move: for the sampled
    objective they are compared with the reference's autograd instead.
    """
    torch.manual_seed(10)
    double = {"dtype": torch.float64}
    hidden, weight = torch.randn(3, 4, **double), torch.randn(11, 4, **double)
    bias, teacher = torch.randn(11, **double), (torch.randn(3, 5, **double), torch.randn(11, 5, **double))
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    token_ids, token_weight = torch.tensor([0, 10, 4]), torch.rand(3, **double)

    def loss(function, hidden, weight, bias):
        options = {
            "objective": objective,
            "temperature": 0.7,
            "beta": 0.3,
            "student_softcap": 3.0,
            "student_scale": 1.2,
        }
        return function(hidden, weight, *teacher, token_ids, token_weight, student_bias=bias, **options)[0]

    if objective == "sampled_reverse_kl":
        ours = torch.autograd.grad(loss(linear_distill_loss, *leaves), leaves)
        truth = torch.autograd.grad(loss(reference.linear_distill_loss, *leaves), leaves)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    else:
        assert torch.autograd.gradcheck(lambda *leaves: loss(linear_distill_loss, *leaves), leaves)


def test_expected_sampled_gradient_is_the_exact_one():
    """Over all tokens, weighted by their probability, the sampled objective's gradient is that of the reverse KL."""
    torch.manual_seed(11)
    V = 9
    hidden, weight = torch.randn(1, 4, dtype=torch.float64), torch.randn(V, 4, dtype=torch.float64, requires_grad=True)
    teacher_hidden, teacher_weight = torch.randn(1, 6, dtype=torch.float64), torch.randn(V, 6, dtype=torch.float64)
    every = torch.arange(V)
    probability = (hidden @ weight.detach().T).softmax(-1)[0]
    sampled, _ = linear_distill_loss(
        hidden.expand(V, -1), weight, teacher_hidden.expand(V, -1), teacher_weight, every, probability
    )
    full, _ = linear_distill_loss(
        hidden, weight, teacher_hidden, teacher_weight, every[:1], torch.ones(1), objective="reverse_kl"
    )
    ours, truth = torch.autograd.grad(sampled, weight)[0], torch.autograd.grad(full, weight)[0]
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
