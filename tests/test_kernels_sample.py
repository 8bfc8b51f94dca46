"""`sample`: the distribution drawn from, its log-probabilities, and what fixes the random number."""

import math

import pytest
import torch
from kernels_common import over_implementations, running

from distill_kernels import reference, sample
from distill_kernels.counter import uniform

FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


def at_a_boundary(logits: torch.Tensor, draws: torch.Tensor, **options) -> torch.Tensor:
    """[R] bool: rows whose nucleus or whose token the rounding of a sum may decide (within 1e-6, in float64)."""
    cumulative = reference.sampling_logprobs(logits.double(), **options).exp().cumsum(-1)
    near = (cumulative - draws[:, None]).abs().amin(-1) < 1e-6
    if "top_p" in options:
        before_top_p = {name: value for name, value in options.items() if name in ("temperature", "top_k")}
        mass = reference.sampling_logprobs(logits.double(), **before_top_p).exp()
        sums = mass.sort(descending=True).values.cumsum(-1)
        near |= (sums - options["top_p"]).abs().amin(-1) < 1e-6
    return near


@over_implementations
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("V", [1, 7, 1000, 5003])
def test_agrees_with_sorting(implementation, options, V):
    """Token and both log-probabilities are those of the sort-based reference, up to rounding at a boundary."""
    R = 6 if implementation == "interpreted" else 300
    torch.manual_seed(0)
    logits = torch.randn(R, V) * 3
    row_ids = torch.randint(2**40, (R,))
    with running(implementation, block=4096 if V > 1000 else 256) as device:
        ours = sample(logits.to(device), seed=2**62 + 3, step=2**33 + 5, row_ids=row_ids.to(device), **options)
    truth = reference.sample(logits.double(), seed=2**62 + 3, step=2**33 + 5, row_ids=row_ids, **options)
    excused = at_a_boundary(logits, uniform(2**62 + 3, 2**33 + 5, row_ids), **options)
    assert excused.float().mean() < 0.02
    assert torch.equal(ours.token_ids.cpu()[~excused], truth.token_ids[~excused])
    for name in ("logprob", "sampling_logprob"):
        field = getattr(ours, name).cpu()
        assert field.dtype == torch.float32
        torch.testing.assert_close(field[~excused].double(), getattr(truth, name)[~excused], rtol=0, atol=5e-6)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@over_implementations
def test_distribution(implementation, options):
    """20,000 draws against the filtered probabilities: chi-square, at a level of one in a thousand."""
    if implementation == "interpreted":
        pytest.skip("20,000 rows take minutes to interpret; test_agrees_with_sorting compares the tokens")
    draws, V = 20_000, 50
    torch.manual_seed(1)
    logits = torch.randn(1, V) * 1.5
    with running(implementation) as device:
        drawn = sample(logits.to(device).expand(draws, V), seed=5, step=9, **options).token_ids.cpu()
    counts = drawn.bincount(minlength=V).double()
    probability = reference.sampling_logprobs(logits.double(), **options)[0].exp()
    support = probability > 0
    assert not counts[~support].any()
    expected = probability[support] * draws
    enough = expected >= 5
    statistic = ((counts[support][enough] - expected[enough]) ** 2 / expected[enough]).sum()
    degrees = torch.tensor((enough.sum() - 1).item() / 2, dtype=torch.float64)
    assert torch.special.gammaincc(degrees, statistic / 2) > 1e-3


@over_implementations
def test_the_counter_fixes_the_draw(implementation):
    """Same (seed, step, row id), same token, in any batch; each of the three changes it; a tensor step is a number."""
    torch.manual_seed(2)
    logits = torch.zeros(1, 997).expand(8, 997)
    with running(implementation, block=1024) as device:
        logits = logits.to(device)
        first = sample(logits, seed=1, step=2).token_ids
        assert torch.equal(first, sample(logits, seed=1, step=torch.tensor([2], device=device)).token_ids)
        rows = torch.tensor([6, 3], device=device)
        assert torch.equal(sample(logits[:2], seed=1, step=2, row_ids=rows).token_ids, first[rows])
        assert len(set(first.tolist())) > 4
        assert not torch.equal(first, sample(logits, seed=2, step=2).token_ids)
        assert not torch.equal(first, sample(logits, seed=1, step=3).token_ids)


@over_implementations
def test_edges(implementation):
    """Ties, -inf columns, a certain token, extreme logits, half precision, strides, and no rows at all."""
    with running(implementation, block=8) as device:
        ties = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]], device=device).expand(12, 5)
        drawn = sample(ties, top_k=2, seed=0, step=0)
        assert set(drawn.token_ids.tolist()) <= {1, 2, 3}  # the tie of the second largest stays whole
        torch.testing.assert_close(drawn.sampling_logprob, torch.full((12,), -math.log(3), device=device))
        holes = torch.full((6, 20), -math.inf, device=device)
        holes[:, 11], holes[:, 17] = 1e4, -1e4
        for options in FILTERS:
            drawn = sample(holes, seed=0, step=0, **options)
            assert drawn.token_ids.eq(11).all()
            assert not drawn.logprob.any()
            assert not drawn.sampling_logprob.any()
        half = torch.randn(20, 4, device=device).bfloat16().T
        assert sample(half, top_p=0.5, seed=0, step=0).token_ids.shape == (4,)
        wide, narrow = sample(half.float(), seed=3, step=0), sample(half, seed=3, step=0)
        assert torch.equal(wide.token_ids, narrow.token_ids)
        assert sample(half[:0], seed=0, step=0).logprob.shape == (0,)


@over_implementations
def test_large_vocabulary(implementation):
    torch.manual_seed(3)
    V = 151_936
    logits = torch.randn(2, V) * 2
    with running(implementation, block=65_536) as device:
        for options in ({}, {"top_k": 50}, {"top_p": 0.9}):
            ours = sample(logits.to(device), seed=4, step=1, **options)
            truth = reference.sample(logits.double(), seed=4, step=1, **options)
            excused = at_a_boundary(logits, uniform(4, 1, torch.arange(2)), **options)
            assert torch.equal(ours.token_ids.cpu()[~excused], truth.token_ids[~excused])


def test_uniform_numbers():
    """Philox 4x32-10 gives the published answers; the numbers fill (0, 1) evenly."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1)
    assert uniform(0, 0, zero).item() == (0x6627E8D5 + 0.5) * 2**-32
    assert uniform(-1, -1, ones).item() == (0x408F276D + 0.5) * 2**-32
    many = uniform(7, 3, torch.arange(100_000))
    assert many.min() > 0
    assert many.max() < 1
    counts = torch.histc(many, 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # chi-square of 99 degrees, one in a thousand
