"""`reverse_kl` against float64: values and gradients, over sizes, dtypes, temperatures and extreme logits."""

import math

import pytest
import torch
from kernels_common import assert_as_good_as_pytorch, exact, over_implementations, running

from distill_kernels import TokenStats, reference, reverse_kl

CARRIES_GRADIENT = {"student_logprob", "reverse_kl", "student_entropy"}


def compare(student, teacher, token_ids, seed=0, **options) -> TokenStats:
    """Statistics and the gradient of a random combination of them, against float64 and PyTorch in the same dtype."""
    student = student.requires_grad_()
    ours = reverse_kl(student, teacher, token_ids, **options)
    # Half-precision logits are exact inputs: the statistics are float32 work on them, the gradient is rounded to half.
    student_same = student.detach().cpu().clone().requires_grad_()
    same = reference.reverse_kl(student_same, teacher.cpu(), token_ids.cpu(), **options)
    wide = reference.reverse_kl(student.detach().cpu().float(), teacher.cpu().float(), token_ids.cpu(), **options)
    student_exact = exact(student)
    truth = reference.reverse_kl(student_exact, exact(teacher), token_ids.cpu(), **options)
    for name in TokenStats._fields:
        assert getattr(ours, name).dtype == torch.float32
        assert getattr(ours, name).requires_grad == (name in CARRIES_GRADIENT)
        assert_as_good_as_pytorch(getattr(ours, name), getattr(wide, name), getattr(truth, name), name)

    upstream = {
        name: torch.randn(len(token_ids), generator=torch.Generator().manual_seed(seed)) for name in CARRIES_GRADIENT
    }

    def backward(stats, logits):
        usable = {name: getattr(stats, name).cpu().isfinite() for name in CARRIES_GRADIENT}
        loss = sum(
            (getattr(stats, name).cpu()[usable[name]] * upstream[name].to(stats[0].dtype)[usable[name]]).sum()
            for name in CARRIES_GRADIENT
        )
        return torch.autograd.grad(loss, logits)[0]

    gradients = [backward(s, x) for s, x in ((ours, student), (same, student_same), (truth, student_exact))]
    assert gradients[0].dtype == student.dtype
    assert_as_good_as_pytorch(*gradients, "gradient")
    return ours


@over_implementations
@pytest.mark.parametrize(("K", "V"), [(0, 7), (1, 1), (7, 7), (130, 7), (7, 1000), (3, 5003), (1, 151_936)])
def test_sizes(implementation, K, V):
    torch.manual_seed(0)
    with running(implementation, block={7: 4, 1000: 256, 5003: 2048}.get(V, 32_768)) as device:
        student, teacher = torch.randn(2, K, V, device=device) * 3
        compare(student, teacher, torch.randint(V, (K,), device=device))


@over_implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_dtypes_and_temperatures(implementation, dtype, temperature):
    torch.manual_seed(1)
    with running(implementation) as device:
        student = (torch.randn(3, 700, device=device) * 3).to(dtype)
        teacher = (torch.randn(3, 700, device=device) * 3).to(dtype)
        compare(student, teacher, torch.randint(700, (3,), device=device), temperature=temperature)


@over_implementations
def test_padded_vocabularies_and_other_dtype_of_teacher(implementation):
    """Columns past vocab_size belong to no softmax, whatever they hold, and get no gradient."""
    torch.manual_seed(2)
    with running(implementation) as device:
        student, teacher = torch.randn(4, 300, device=device), torch.randn(4, 310, device=device).bfloat16()
        student[:, 291:], teacher[:, 291:] = 50.0, float("nan")
        token_ids = torch.tensor([0, 290, 290, 7], device=device)  # the boundaries, and one id twice
        student.requires_grad_()
        stats = reverse_kl(student, teacher, token_ids, vocab_size=291)
        (gradient,) = torch.autograd.grad(stats.reverse_kl.sum(), student)
        assert torch.equal(gradient[:, 291:], torch.zeros_like(gradient[:, 291:]))
        compare(student.detach()[:, :291], teacher[:, :291], token_ids)


@over_implementations
def test_extreme_logits(implementation):
    """Logits of 1e4 in size: differences of log-probabilities lose nothing where the models agree."""
    torch.manual_seed(3)
    with running(implementation) as device:
        student = torch.randn(4, 600, device=device)
        student[0] += 1e4
        student[1] -= 1e4
        student[2, 17], student[3, 18] = 1e4, -1e4
        teacher = student + torch.randn(4, 600, device=device) * 0.1
        teacher[3] = student[3].flip(0)
        compare(student, teacher, torch.tensor([17, 599, 17, 18], device=device))
        agreeing = compare(student.detach(), student.detach().clone(), torch.tensor([17, 599, 17, 18], device=device))
        assert agreeing.reverse_kl.abs().max() < 1e-6


@over_implementations
def test_columns_of_probability_zero(implementation):
    """-inf in both models is left out; in the student alone it changes nothing; in the teacher alone the divergence
    is infinite, and its gradient 0 while the other gradients stay."""
    torch.manual_seed(4)
    with running(implementation) as device:
        student, teacher = torch.randn(2, 5, 400, device=device)
        student[0, 3:90] = teacher[0, 3:90] = -math.inf
        student[1, 300:] = -math.inf
        teacher[2, 5] = -math.inf
        student[3, :256], teacher[3, :256] = -math.inf, -math.inf  # a whole first block
        student[4, 0] = teacher[4, 0] = -math.inf
        token_ids = torch.tensor([100, 10, 11, 399, 0], device=device)  # row 4: a token impossible in both
        stats = compare(student, teacher, token_ids)
        assert stats.reverse_kl.isinf().tolist() == [False, False, True, False, False]
        assert stats.reward[4] == 0
        leaf = student.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reverse_kl(leaf, teacher, token_ids).reverse_kl.sum(), leaf)
        assert gradient.isfinite().all()
        assert not gradient[2].any()


@over_implementations
def test_strides(implementation):
    """Transposed, sliced and expanded logits are read where they lie."""
    torch.manual_seed(5)
    with running(implementation) as device:
        student = torch.randn(500, 6, device=device).T
        teacher = torch.randn(1, 1000, device=device).expand(6, -1)[:, ::2]
        assert not student.is_contiguous()
        compare(student, teacher, torch.randint(500, (12,), device=device)[::2])


@over_implementations
def test_gradients_that_are_asked_for_alone(implementation):
    """A field that nobody used has no part in the gradient, not even a NaN."""
    torch.manual_seed(6)
    with running(implementation) as device:
        student, teacher = torch.randn(2, 3, 50, device=device)
        token_ids = torch.randint(50, (3,), device=device)
        for name in CARRIES_GRADIENT:
            leaf, leaf_exact = student.clone().requires_grad_(), exact(student).requires_grad_()
            leaf_same = student.cpu().clone().requires_grad_()
            (ours,) = torch.autograd.grad(getattr(reverse_kl(leaf, teacher, token_ids), name).sum(), leaf)
            (same,) = torch.autograd.grad(
                getattr(reference.reverse_kl(leaf_same, teacher.cpu(), token_ids.cpu()), name).sum(), leaf_same
            )
            (truth,) = torch.autograd.grad(
                getattr(reference.reverse_kl(leaf_exact, exact(teacher), token_ids.cpu()), name).sum(), leaf_exact
            )
            assert_as_good_as_pytorch(ours, same, truth, name)


def test_gradcheck():
    """The twin's analytic gradient in float64 against finite differences."""
    torch.manual_seed(7)
    student = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 11, dtype=torch.float64)
    token_ids = torch.tensor([0, 10, 4])

    def differentiable(logits):
        stats = reverse_kl(logits, teacher, token_ids, temperature=0.7)
        return stats.student_logprob, stats.reverse_kl, stats.student_entropy

    assert torch.autograd.gradcheck(differentiable, student)
