"""The fused head of a student whose teacher names its likeliest tokens: against float64, PyTorch and the whole."""

import math

import pytest
import torch
from kernels_common import INTERPRETING, over_implementations, running
from kernels_linear import compare, make, run

from distill_kernels import TopTokens, linear_distill_loss, reference

# What differs between them is plain PyTorch, of which the interpreter knows nothing new.
OBJECTIVES = ("jsd",) if INTERPRETING else ("reverse_kl", "forward_kl", "jsd")
over_objectives = pytest.mark.parametrize("objective", OBJECTIVES)


def named(K, V, H, k, *, device, spread=3.0, vocab_size=None, **options) -> dict:
    """Arguments with a teacher elsewhere, which names its k likeliest tokens of random logits."""
    arguments = make(K, V, V, H, 4, device=device, ids_below=vocab_size, **options)
    logprobs = (spread * torch.randn(K, vocab_size or V, device=device)).log_softmax(-1)
    top = logprobs.topk(k, -1)
    said = logprobs.gather(1, arguments["token_ids"][:, None])[:, 0]
    arguments |= {"teacher_hidden": None, "teacher_weight": None, "teacher_logprob": said}
    return arguments | {"teacher_top": TopTokens(top.indices, top.values)}


@over_implementations
@over_objectives
@pytest.mark.parametrize(("K", "V", "k"), [(0, 7, 2), (1, 2, 1), (7, 1000, 20), (50, 7, 7), (2, 5003, 64)])
def test_sizes(implementation, objective, K, V, k):
    """The workspace holds a few rows, so that there are several chunks; all of the vocabulary may be named."""
    torch.manual_seed(0)
    with running(implementation, block={7: 8, 1000: 512, 5003: 2048}.get(V, 16)) as device:
        compare(named(K, V, 12, k, device=device), workspace_bytes=3 * 8 * V, objective=objective)


@over_implementations
@over_objectives
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(implementation, objective, dtype):
    torch.manual_seed(1)
    with running(implementation) as device:
        arguments = named(48, 300, 16, 5, device=device, dtype=dtype)
        arguments["token_weight"] *= 1e-4  # which half precision has to leave out
        compare(arguments, objective=objective)


@over_implementations
@over_objectives
def test_all_options(implementation, objective):
    torch.manual_seed(2)
    with running(implementation) as device:
        arguments = named(5, 310, 16, 4, device=device, vocab_size=301)
        arguments["token_weight"][1] = 0
        top = arguments["teacher_top"]
        top.token_ids[2, 1:], top.logprob[3, 3] = -1, -math.inf  # which are absent
        _, stats, gradients = compare(
            arguments,
            objective=objective,
            beta=0.3,
            vocab_size=301,
            temperature=2.0,
            student_bias=torch.randn(310, device=device, requires_grad=True),
            student_softcap=4.0,
            student_scale=0.8,
            workspace_bytes=3 * 8 * 310,
        )
        assert stats.reverse_kl.isnan().all()
        assert not gradients["student_weight"][301:].any()
        assert not gradients["student_hidden"][1].any()


@over_implementations
@over_objectives
def test_naming_all_tokens_is_the_whole_divergence(implementation, objective):
    torch.manual_seed(3)
    with running(implementation) as device:
        arguments = make(6, 40, 40, 8, 12, device=device)
        whole, _, right = run(linear_distill_loss, arguments, 1.3, objective=objective)
        teacher = (arguments["teacher_hidden"] @ arguments["teacher_weight"].T).log_softmax(-1).sort(descending=True)
        elsewhere = {"teacher_hidden": None, "teacher_weight": None}
        elsewhere |= {"teacher_top": TopTokens(teacher.indices, teacher.values)}
        found, _, gradients = run(linear_distill_loss, arguments | elsewhere, 1.3, objective=objective)
        torch.testing.assert_close(found, whole, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(gradients, right, rtol=1e-4, atol=1e-5)


@over_objectives
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_the_least_divergence_of_any_teacher_that_fits(objective, k):
    """A vocabulary of 5: below that of every teacher which has the same k likeliest tokens, the true one among them;
    above that of two models whose others count as one; and its gradient is that of what it is."""
    generator = torch.Generator().manual_seed(k)

    def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
        m = 0.3 * q + 0.7 * p
        kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
        return {"reverse_kl": kl(p, q), "forward_kl": kl(q, p)}.get(objective, 0.3 * kl(q, m) + 0.7 * kl(p, m))

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        unit, one = torch.eye(5, dtype=torch.float64), torch.ones(1).double()
        options = {"teacher_top": TopTokens(top.indices[None], top.values.log()[None]), "beta": 0.3}
        ids = torch.tensor([0])
        return linear_distill_loss(logits[None], unit, None, None, ids, one, objective=objective, **options)[0]

    def merged(p: torch.Tensor) -> torch.Tensor:
        others = torch.ones(5, dtype=torch.bool).index_fill(0, top.indices, False)
        return torch.cat([p[top.indices], p[others].sum()[None]]) if k < 5 else p

    limited = 0
    for _ in range(20):
        x, y = torch.tensor([[3.0], [1.0]]) * torch.randn(2, 5, generator=generator, dtype=torch.float64)
        p, q, leaf = x.softmax(-1), y.softmax(-1), x.clone().requires_grad_()
        top = q.topk(k)
        loss = loss_of(leaf)
        (gradient,), loss = torch.autograd.grad(loss, leaf), loss.detach()
        steps = 1e-5 * torch.eye(5, dtype=torch.float64)
        differences = torch.stack([(loss_of(x + step) - loss_of(x - step)) / 2e-5 for step in steps])
        torch.testing.assert_close(gradient, differences, rtol=1e-5, atol=1e-7)
        shares = torch.rand(2000, 5, generator=generator, dtype=torch.float64).pow(2).add(1e-6)
        shares = shares.index_fill(1, top.indices, 0)
        fitting = shares / shares.sum(1, keepdim=True).clamp(min=1e-6) * (1 - top.values.sum())
        fitting = fitting.index_copy(1, top.indices, top.values.expand(2000, k))
        fitting = torch.cat([q[None], fitting[(fitting <= top.values[-1] + 1e-12).sum(1) + (k - 1) >= 5]])
        assert loss <= divergence(p, fitting).min() + 1e-9
        if k < 4:
            assert loss >= divergence(merged(p), merged(q)) - 1e-12
            limited += loss > divergence(merged(p), merged(q)) + 1e-6
        else:
            assert loss == pytest.approx(float(divergence(p, q)), abs=1e-6)
    assert limited > 3 or k >= 4


@over_implementations
@over_objectives
def test_a_student_that_left_what_is_named(implementation, objective):
    """Or that has nothing else: neither a probability of almost 1 nor one of almost 0 is rounded away."""
    with running(implementation) as device:
        arguments = named(4, 60, 8, 5, device=device)
        for row, shift in enumerate((-30.0, 30.0)):
            bias = torch.zeros(60, device=device)
            bias[arguments["teacher_top"].token_ids[row]] = shift
            arguments["token_weight"] = torch.eye(4, device=device)[row]
            loss, _, gradients = compare(arguments, objective=objective, student_bias=bias)
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients.values())


@over_implementations
def test_a_tasks_advantage_is_added(implementation):
    torch.manual_seed(9)
    with running(implementation) as device:
        task = 3 * torch.randn(5, device=device)
        ratio = {"sampling_logprob": -4 * torch.rand(5, device=device), "importance_clip": 1.5}
        compare(named(5, 60, 8, 4, device=device), objective="reverse_kl", task_advantage=task, **ratio)


def test_the_reference_is_what_it_says():
    arguments = named(3, 9, 4, 2, device="cpu")
    loss, stats = reference.linear_distill_loss(**arguments, objective="reverse_kl")
    assert loss.isfinite()
    assert stats.reverse_kl.isnan().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "sampled_reverse_kl"}, ["teacher_top", "sampled_reverse_kl"]),
        ({"teacher_top": None}, ["teacher_top", "'reverse_kl'"]),
        ({"teacher_hidden": torch.zeros(4, 3), "teacher_weight": torch.zeros(9, 3)}, ["teacher_top", "here"]),
        ({"teacher_top": TopTokens(torch.zeros(3, 2).long(), torch.zeros(3, 2))}, ["teacher_top", "[4, k]", "[3, 2]"]),
        ({"teacher_top": TopTokens(torch.zeros(4, 10).long(), torch.zeros(4, 10))}, ["1 to 9", "[4, 10]"]),
        ({"teacher_top": TopTokens(torch.zeros(4, 2), torch.zeros(4, 2))}, ["teacher_top.token_ids", "int64"]),
        ({"teacher_top": TopTokens(torch.zeros(4, 2).long(), torch.zeros(4, 3))}, ["alike", "[4, 3]"]),
    ],
)
def test_errors(changes, words):
    arguments = named(4, 9, 3, 2, device="cpu") | {"objective": "reverse_kl", "teacher_logprob": None} | changes
    with pytest.raises(ValueError) as raised:  # noqa: PT011 # the words are looked for below
        linear_distill_loss(**arguments)
    assert all(word in str(raised.value) for word in words), raised.value
