"""Every estimator's expectation by enumeration: a vocabulary of 5, float64, completions of one and two tokens.

The models are tables: the state of a token is the one before it, a one-hot hidden state, so the head's weight holds the
logits of every state. What claims to be unbiased must be so to rounding; the bias of what is not is measured.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.loss import LossOptions
from distill.loss.advantage import advantages, needs_scores
from distill.loss.gradients import token_weights
from distill_kernels import reference

V = 5
STUDENT, TEACHER, OLDER = (
    1.5 * torch.randn(V, V + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for seed in (1, 2, 3)
)
over_baselines = pytest.mark.parametrize("baseline", ["none", "group", "exact"])


def completions(length: int, ends: bool) -> list[tuple[int, ...]]:
    """All of them; where `ends`, token 0 ends one."""
    found = itertools.product(range(V), repeat=length)
    if not ends:
        return list(found)
    return list(dict.fromkeys(ids[: ids.index(0) + 1] if 0 in ids else ids for ids in found))


def states_of(ids: tuple[int, ...]) -> list[int]:
    """State V is the beginning."""
    return [V, *ids[:-1]]


def logprobs(table: Tensor, ids: tuple[int, ...]) -> Tensor:
    """[T] of a completion's tokens."""
    return table.log_softmax(0)[list(ids), states_of(ids)]


def group_gradient(group: list[tuple[int, ...]], options: LossOptions, weights: str, older: Tensor | None) -> Tensor:
    """Gradient [V, V + 1] of the student's table for one group of completions of one prompt."""
    table = STUDENT.clone().requires_grad_()
    lengths = torch.tensor([len(ids) for ids in group])
    hidden = torch.eye(V + 1, dtype=torch.float64)[[state for ids in group for state in states_of(ids)]]
    ids = torch.tensor([token for ids in group for token in ids])
    inputs = (hidden, table, hidden, TEACHER, ids)
    advantage = None
    if needs_scores(options):
        scores = reference.linear_reverse_kl(*inputs)
        advantage = advantages(scores, lengths, torch.zeros(len(group), dtype=torch.int64), options)
    constant = torch.full((len(ids),), 1 / len(group), dtype=torch.float64)
    loss, _ = reference.linear_distill_loss(
        *inputs,
        constant if weights == "constant" else token_weights(lengths, weights),
        objective=options.objective,
        sampling_logprob=None if older is None else torch.cat([logprobs(older, ids) for ids in group]),
        importance_clip=options.importance_clip,
        advantage=advantage,
    )
    return torch.autograd.grad(loss, table)[0]


def expectation(
    options: LossOptions,
    length: int,
    *,
    rollouts: int = 1,
    ends: bool = False,
    weights: str = "constant",
    sampler: Tensor = STUDENT,
    older: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Mean and variance of the gradient over every group of rollouts, drawn from `sampler`."""
    mean, square = torch.zeros_like(STUDENT), 0.0
    for group in itertools.product(completions(length, ends), repeat=rollouts):
        probability = math.exp(sum(logprobs(sampler, ids).sum().item() for ids in group))
        gradient = group_gradient(list(group), options, weights, older)
        mean += probability * gradient
        square += probability * gradient.square().sum().item()
    return mean, square - mean.square().sum().item()


def target(length: int, discount: float, *, ends: bool = False, sampler: Tensor | None = None) -> Tensor:
    """The gradient of sum_k KL_k over the states that are visited, an earlier token's influence on the KL j tokens
    later weighted by discount^j. With discount 1 that is the reverse KL of whole completions; `sampler` visits instead
    of the student."""
    table = STUDENT.clone().requires_grad_()
    student, teacher = table.log_softmax(0), TEACHER.log_softmax(0)
    kl = (student.exp() * (student - teacher)).sum(0)  # [V + 1]
    if length == 1:
        return torch.autograd.grad(kl[V], table)[0]
    visits = student[:, V].exp() if sampler is None else sampler.log_softmax(0)[:, V].exp()
    visits = discount * visits + (1 - discount) * visits.detach()
    alive = torch.ones(V, dtype=torch.float64)
    alive[0] = 0.0 if ends else 1.0
    return torch.autograd.grad(kl[V] + (visits * alive * kl[:V]).sum(), table)[0]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("ends", [False, True])
def test_the_expectation_over_the_vocabulary_is_exact(length, ends):
    assert_equal(expectation(LossOptions("reverse_kl"), length, ends=ends)[0], target(length, 0, ends=ends))


@over_baselines
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("ends", [False, True])
def test_no_baseline_changes_the_expectation(baseline, discount, length, ends):
    options = LossOptions(baseline=baseline, discount=discount)
    found, variance = expectation(options, length, ends=ends, rollouts=2 if baseline == "group" else 1)
    assert_equal(found, target(length, discount, ends=ends))
    assert variance > 1e-3


def test_a_group_of_three_is_unbiased_too():
    assert_equal(expectation(LossOptions(baseline="group"), 1, rollouts=3)[0], target(1, 0))


def test_the_exact_baseline_has_less_variance_than_none_and_the_expectation_less_than_both():
    variances = {
        name: expectation(options, 2)[1]
        for name, options in {
            "none": LossOptions(),
            "exact": LossOptions(baseline="exact"),
            "full": LossOptions("reverse_kl"),
        }.items()
    }
    assert variances["full"] < variances["exact"] < variances["none"]
    returns, expected = (expectation(LossOptions(baseline=b, discount=1.0), 2)[1] for b in ("none", "exact"))
    assert expected < returns


def test_a_discount_below_one_is_biased_against_the_kl_of_completions():
    """By (1 - discount) times what the KL owes to earlier tokens, at two tokens."""
    whole, own = target(2, 1), target(2, 0)
    assert (whole - own).norm() > 0.05 * whole.norm()
    for discount in (0.0, 0.5, 0.9):
        found, _ = expectation(LossOptions(discount=discount), 2)
        assert_equal(found - whole, (1 - discount) * (own - whole))


def test_a_reward_clip_is_biased_by_what_it_cuts_off():
    rewards = (TEACHER.log_softmax(0) - STUDENT.log_softmax(0))[:, V]
    largest = rewards.abs().max().item()
    free, _ = expectation(LossOptions(reward_clip=largest + 1e-9), 1)
    assert_equal(free, target(1, 0))
    biases = []
    for clip in (0.75 * largest, 0.25 * largest):
        found, _ = expectation(LossOptions(reward_clip=clip), 1)
        # d log p(y) / d logits = onehot(y) - p: the bias is the expectation of what was cut off times that.
        probability = STUDENT.log_softmax(0)[:, V].exp()
        cut = probability * (rewards - rewards.clamp(-clip, clip))
        expected = torch.zeros_like(STUDENT)
        expected[:, V] = cut - probability * cut.sum()
        assert_equal(found - target(1, 0), expected)
        biases.append(expected.norm())
    assert 0 < biases[0] < biases[1]


def test_an_importance_ratio_corrects_the_tokens_of_another_sampler():
    """Each token's own probability, not the probability of the state that it was drawn in."""
    for length in (1, 2):
        free = LossOptions(importance_clip=1e9)
        found, _ = expectation(free, length, sampler=OLDER, older=OLDER)
        assert_equal(found, target(length, 0, sampler=OLDER))
        uncorrected, _ = expectation(LossOptions(), length, sampler=OLDER)
        assert (uncorrected - target(length, 0, sampler=OLDER)).norm() > 0.1 * uncorrected.norm()
    states = target(2, 0, sampler=OLDER) - target(2, 0)
    assert states.norm() > 0.1 * target(2, 0).norm()  # what stays biased: the older sampler's states


@over_baselines
def test_a_tempered_sampler_is_corrected_with_any_baseline(baseline):
    tempered = STUDENT / 0.6
    options = LossOptions(baseline=baseline, importance_clip=1e9)
    found, _ = expectation(options, 1, sampler=tempered, older=tempered, rollouts=2 if baseline == "group" else 1)
    assert_equal(found, target(1, 0))


def test_truncating_the_ratio_is_biased_by_the_weight_that_is_missing():
    sampler, student = OLDER.log_softmax(0)[:, V], STUDENT.log_softmax(0)[:, V]
    rewards = TEACHER.log_softmax(0)[:, V] - student
    for clip in (1.0, 2.0):
        found, _ = expectation(LossOptions(importance_clip=clip), 1, sampler=OLDER, older=OLDER)
        ratio = (student - sampler).exp()
        missing = sampler.exp() * (ratio - ratio.clamp(max=clip)) * rewards
        bias = torch.zeros_like(STUDENT)
        bias[:, V] = missing - student.exp() * missing.sum()
        assert bias.norm() > 1e-3
        assert_equal(found - target(1, 0), bias)


@pytest.mark.parametrize("weights", ["sequence", "token"])
def test_weights_that_know_the_length_are_biased_where_completions_end_early(weights):
    """1/T depends on whether the token ended the completion, so even a constant baseline moves the expectation."""
    plain, _ = expectation(LossOptions(), 2, ends=True, weights=weights)
    exact, _ = expectation(LossOptions(baseline="exact"), 2, ends=True, weights=weights)
    full, _ = expectation(LossOptions("reverse_kl"), 2, ends=True, weights=weights)
    assert (plain - full).norm() > 0.01 * full.norm()
    assert (plain - exact).norm() > 0.01 * full.norm()
    # With completions of one length there is nothing to know.
    same = [
        expectation(options, 2, weights=weights)[0]
        for options in (LossOptions(), LossOptions(baseline="exact"), LossOptions("reverse_kl"))
    ]
    torch.testing.assert_close(same[0], same[2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(same[1], same[2], rtol=1e-6, atol=1e-7)


def test_a_group_baseline_is_made_of_the_prompts_other_rollouts():
    """Two prompts, lengths 2, 1, 3 and 1, 2: against sums written out."""
    lengths, index = torch.tensor([2, 1, 3, 1, 2]), torch.tensor([0, 0, 0, 1, 1])
    reward = torch.arange(9, dtype=torch.float64).square()
    zero = torch.zeros_like(reward)
    stats = reference.TokenStats(zero, zero, reward, zero, zero, zero)
    rows = list(reward.split(lengths.tolist()))
    for discount in (0.0, 0.5, 1.0):
        found = advantages(stats, lengths, index, LossOptions(baseline="group", discount=discount))
        expected = []
        for i, row in enumerate(rows):
            others = [rows[j] for j in range(5) if j != i and index[j] == index[i]]
            level = sum(other.mean() for other in others) / len(others)
            for k in range(len(row)):
                own = sum(discount**j * row[k + j] for j in range(len(row) - k))
                rests = [sum(discount**j for j in range(len(o) - k)) for o in others if len(o) > k]
                horizon = sum(rests) / len(rests) if rests else 1.0
                expected.append(own - level * horizon)
        torch.testing.assert_close(found, torch.stack(expected))


def test_a_reward_without_bound_stays_with_its_own_token():
    lengths, index = torch.tensor([2, 2]), torch.tensor([0, 0])
    reward = torch.tensor([1.0, -math.inf, 2.0, 3.0])
    kl = torch.tensor([0.5, math.inf, 0.5, 0.5])
    zero = torch.zeros(4)
    stats = reference.TokenStats(zero, zero, reward, kl, zero, zero)
    for options in (LossOptions(baseline="group"), LossOptions(baseline="exact"), LossOptions(discount=1.0)):
        found = advantages(stats, lengths, index, options)
        assert found[1] == -math.inf
        assert found[[0, 2, 3]].isfinite().all()
    clipped = advantages(stats, lengths, index, LossOptions(reward_clip=4.0))
    assert clipped.tolist() == [1.0, -4.0, 2.0, 3.0]
