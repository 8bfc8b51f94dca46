"""`sample`: the distribution drawn from, its log-probabilities, and what fixes the random numbers."""

import math

import pytest
import torch
from kernels_common import INTERPRETING, over_implementations, running

from distill_kernels import reference, sample, twin_sample
from distill_kernels.counter import column_words, exponential, row_keys

FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]
RUNS_TRITON = INTERPRETING or torch.cuda.is_available()
if RUNS_TRITON:
    import triton
    import triton.language as tl

    from distill_kernels import triton_sample

    @triton.jit
    def store_numbers(words, exponentials, given, given_exponentials, seed, step, row_id, BLOCK: tl.constexpr):
        cols = tl.arange(0, BLOCK)
        of_columns = triton_sample._words(cols, tl.load(seed), tl.load(step), tl.load(row_id))
        tl.store(words + cols, of_columns)
        tl.store(exponentials + cols, triton_sample._exponential(of_columns))
        tl.store(given_exponentials + cols, triton_sample._exponential(tl.load(given + cols)))


def words_of(seed: int, step: int, row_ids: torch.Tensor, V: int) -> torch.Tensor:
    return column_words(row_keys(seed, step, row_ids), torch.arange(V, dtype=torch.int32))


def at_a_boundary(logits: torch.Tensor, words: torch.Tensor, **options) -> torch.Tensor:
    """[R] bool: rows that rounding may decide: two best scores within 1e-5, or a nucleus within 1e-6 (in float64)."""
    scores = reference.sampling_logprobs(logits.double(), **options).exp() / exponential(words, torch.float64)
    best, second = torch.nn.functional.pad(scores, (0, 1)).topk(2).values.unbind(-1)
    near = best - second < 1e-5 * best
    if "top_p" in options:
        before_top_p = {name: value for name, value in options.items() if name in ("temperature", "top_k")}
        mass = reference.sampling_logprobs(logits.double(), **before_top_p).exp()
        sums = mass.sort(descending=True).values.cumsum(-1)
        near |= (sums - options["top_p"]).abs().amin(-1) < 1e-6
    return near


def surprise(counts: torch.Tensor, expected: torch.Tensor | float) -> float:
    """Probability of a chi-square statistic at least this large, of counts whose sum is given."""
    counts = counts.double().flatten()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def surprise_of_pairs(x: torch.Tensor, y: torch.Tensor) -> float:
    """`surprise` of the leading five bits of words x beside those of y, which are as likely as each other."""
    pairs = (x >> 26).flatten() * 32 + (y >> 26).flatten()
    return surprise(pairs.bincount(minlength=1024), pairs.numel() / 1024)


@over_implementations
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("V", [1, 7, 1000, 5003])
def test_agrees_with_the_reference(implementation, options, V):
    """Token and both log-probabilities are those of the sort-based reference, up to rounding at a boundary."""
    R = 6 if implementation == "interpreted" else 300
    torch.manual_seed(0)
    logits = torch.randn(R, V) * 3
    row_ids = torch.randint(2**40, (R,))
    with running(implementation, block=4096 if V > 1000 else 256) as device:
        ours = sample(logits.to(device), seed=2**62 + 3, step=2**33 + 5, row_ids=row_ids.to(device), **options)
    truth = reference.sample(logits.double(), seed=2**62 + 3, step=2**33 + 5, row_ids=row_ids, **options)
    excused = at_a_boundary(logits, words_of(2**62 + 3, 2**33 + 5, row_ids, V), **options)
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
        pytest.skip("20,000 rows take minutes to interpret; test_agrees_with_the_reference compares tokens")
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
    assert surprise(counts[support][enough], expected[enough]) > 1e-3


def test_unlikely_columns_are_drawn():
    """A thousand columns of 1e-5 each: 20,000 draws take one of them 200 times, and hardly one twice."""
    probability = torch.full((1001,), 1e-5)
    probability[500] = 1 - 1e-2
    drawn = sample(probability.log().expand(20_000, -1), seed=6, step=1).token_ids
    drawn = drawn[drawn != 500]
    assert abs(len(drawn) - 200) < 4 * math.sqrt(200)
    assert len(drawn.unique()) > 0.8 * len(drawn)


@over_implementations
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_counter_fixes_the_draw(implementation, options):
    """Same (seed, step, row id), same token, in any batch; each of the three changes it; tensors are as numbers."""
    torch.manual_seed(2)
    with running(implementation, block=256) as device:
        logits = torch.zeros(8, 997, device=device) if not options else torch.randn(8, 997, device=device)
        first = sample(logits, seed=1, step=2, **options).token_ids
        seed, step = torch.tensor(1, device=device), torch.tensor([2], device=device)
        assert torch.equal(first, sample(logits, seed=seed, step=step, **options).token_ids)
        rows = torch.tensor([6, 3], device=device)
        assert torch.equal(sample(logits[rows], seed=1, step=2, row_ids=rows, **options).token_ids, first[rows])
        assert len(set(first.tolist())) > 4
        assert not torch.equal(first, sample(logits, seed=2, step=2, **options).token_ids)
        assert not torch.equal(first, sample(logits, seed=1, step=3, **options).token_ids)


def test_draws_of_neighbours_are_independent():
    """Of the next row, step or seed, whatever the first draw was."""
    V, R = 8, 40_000
    torch.manual_seed(4)
    logits = torch.randn(V)
    drawn = {at: sample(logits.expand(R, V), seed=at[0], step=at[1]).token_ids for at in [(11, 30), (11, 31), (12, 30)]}
    probability = logits.double().softmax(-1)
    expected = (probability[:, None] * probability).flatten() * (R // 2)
    first = drawn[11, 30]
    half = slice(R // 2)
    pairs = (first[::2], first[1::2]), (first[half], drawn[11, 31][half]), (first[half], drawn[12, 30][half])
    for one, other in pairs:
        assert surprise((one * V + other).bincount(minlength=V * V), expected) > 1e-3


@over_implementations
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 40}], ids=str)
def test_noise_flips_no_token(implementation, options):
    """Logits of two programs differ by some 1e-5: a token flips where its two best scores are as close, and only there.

    Inverting the cumulative mass at one random number flipped 0.26 % at this noise (V 49,152): none is looked for
    among enough draws that it would have flipped several.
    """
    R = 24 if implementation == "interpreted" else 4000
    torch.manual_seed(5)
    logits = torch.randn(R, 3000) * 2
    noisy = logits + torch.randn_like(logits) * 1e-5
    with running(implementation, block=1024) as device:
        one, other = (sample(x.to(device), seed=8, step=1, **options).token_ids for x in (logits, noisy))
    assert torch.equal(one, other)


def test_rounded_logits_flip_few_tokens():
    """float32 against bfloat16: at most 1.5 times the total variation, below which no coupling of the two can be."""
    torch.manual_seed(6)
    logits = torch.randn(4000, 3000) * 3 + 10
    rounded = logits.bfloat16()
    flipped = sample(logits, seed=8, step=1).token_ids != sample(rounded, seed=8, step=1).token_ids
    variation = (logits.softmax(-1) - rounded.float().softmax(-1)).abs().sum(-1).mean() / 2
    assert variation < 0.05
    assert flipped.float().mean() < 1.5 * variation


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
def test_a_row_without_a_distribution_leaves_the_others_alone(implementation):
    if implementation == "interpreted":
        pytest.skip("the interpreter has no largest of NaN alone")
    with running(implementation) as device:
        logits = torch.randn(3, 1000, device=device)
        whole = sample(logits, seed=0, step=0).token_ids
        logits[0], logits[1] = math.nan, -math.inf
        drawn = sample(logits, seed=0, step=0).token_ids
        assert ((drawn >= 0) & (drawn < 1000)).all()
        assert drawn[2] == whole[2]


def test_a_certain_token():
    """The only column that is kept wins against any random number; so does one beside columns of 1e-30."""
    logits = torch.full((3000, 300), -70.0)
    logits[:, 123] = 0
    for options in ({}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 1.0}):
        drawn = sample(logits, seed=0, step=0, **options)
        assert drawn.token_ids.eq(123).all()
        assert drawn.sampling_logprob.abs().max() < 1e-6


@over_implementations
def test_large_vocabulary(implementation):
    torch.manual_seed(3)
    V = 151_936
    logits = torch.randn(2, V) * 2
    with running(implementation, block=65_536) as device:
        for options in ({}, {"top_k": 50}, {"top_p": 0.9}):
            ours = sample(logits.to(device), seed=4, step=1, **options)
            truth = reference.sample(logits.double(), seed=4, step=1, **options)
            excused = at_a_boundary(logits, words_of(4, 1, torch.arange(2), V), **options)
            assert torch.equal(ours.token_ids.cpu()[~excused], truth.token_ids[~excused])


@pytest.mark.parametrize(("block", "likely", "slice_bytes"), [(1, 1, 2**12), (128, 1, 2**14), (64, 10**6, 2**22)])
def test_bounds_spare_scores_and_change_nothing(monkeypatch, block, likely, slice_bytes):
    """The CPU's search gives the same tokens however few blocks it begins with: those of all scores."""
    torch.manual_seed(7)
    logits = torch.randn(200, 1003) * torch.tensor([0.0, 1.0, 3.0, 10.0]).repeat(50)[:, None]
    expected = [sample(logits, seed=3, step=1, **options) for options in FILTERS]
    monkeypatch.setattr(twin_sample, "_BLOCK", block)
    monkeypatch.setattr(twin_sample, "_LIKELY_BLOCKS", likely)
    monkeypatch.setattr(twin_sample, "_SLICE_BYTES", slice_bytes)
    for options, truth in zip(FILTERS, expected, strict=True):
        for ours, field in zip(sample(logits, seed=3, step=1, **options), truth, strict=True):
            torch.testing.assert_close(ours, field, rtol=0, atol=1e-6)
    words = torch.cat([torch.arange(1, 2**20), torch.randint(2**20, 2**31, (2**20,)), torch.tensor([2**31 - 1])]).int()
    assert (exponential(words) > words * 2.0**-31 * (1 + 1e-5)).all()  # far from the rounding of a score


def test_row_keys():
    """Philox 4x32-10 gives the published answers, of numbers and of tensors; multipliers are odd."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1)
    for number, ids, words in ((0, zero, (0x6627E8D5, 0xE169C58D)), (-1, ones, (0x408F276D, 0x41C83B0E))):
        for given in (number, torch.tensor(number), torch.tensor([number])):
            key, multiplier = row_keys(given, given, ids)
            assert (key.item() % 2**32, multiplier.item() % 2**32) == (words[0], words[1] | 1)
    keys, multipliers = row_keys(7, 3, torch.arange(100_000))
    assert (multipliers % 2 == 1).all()
    for words in (keys, multipliers):
        assert surprise(((words.flatten() >> 22) + 512).bincount(minlength=1024), 100_000 / 1024) > 1e-3


def test_words_are_independent():
    """At one in ten thousand for each of 15 figures: words fill their range evenly, beside those of other columns,
    rows, steps and seeds too."""
    LIMIT = 1e-4
    rows, V = torch.arange(300), 33_000
    words = words_of(21, 5, rows, V)
    assert words.dtype == torch.int32
    assert words.min() >= 0
    assert surprise((words >> 21).flatten().bincount(minlength=1024), words.numel() / 1024) > LIMIT
    for apart in (1, 2, 3, 16, 1000, 32_768):
        assert surprise_of_pairs(words[:, apart:], words[:, :-apart]) > LIMIT, f"{apart} columns apart"
    for apart in (1, 2, 128):
        assert surprise_of_pairs(words[apart:], words[:-apart]) > LIMIT, f"{apart} rows apart"
    for seed, step in ((21, 6), (22, 5), (21, 2**32 + 5), (2**32 + 21, 5)):
        assert surprise_of_pairs(words, words_of(seed, step, rows, V)) > LIMIT, f"seed {seed}, step {step}"
    small = words[:, :-1] < 2**21  # a likely winner: what stands beside it is as if it were none
    assert surprise(torch.bincount(words[:, 1:][small] >> 26, minlength=32), small.sum() / 32) > LIMIT


def test_exponentials():
    """Their distribution, their scatter within rows, and the correlation of neighbours."""
    rows, V = 400, 49_152
    small, sums, products = torch.zeros(4), torch.empty(rows), torch.empty(rows)
    bins = torch.zeros(64)
    limits = torch.tensor([1e-3, 1e-4, 1e-5, 1e-6])
    for start in range(0, rows, 20):
        part = slice(start, start + 20)
        e = exponential(words_of(31, 7, torch.arange(start, start + 20), V))
        bins += torch.histc(torch.exp(-e), 64, 0, 1)
        small += torch.stack([(e < limit).sum() for limit in limits])
        sums[part] = (e - 1).mean(-1) * math.sqrt(V)
        products[part] = ((e[:, 1:] - 1) * (e[:, :-1] - 1)).mean(-1) * math.sqrt(V)
    N = rows * V
    assert surprise(bins, N / 64) > 1e-3
    assert ((small - N * limits).abs() < 4 * (N * limits).sqrt()).all(), small / (N * limits)
    for name, figures in (("mean", sums), ("product of neighbours", products)):
        assert figures.mean().abs() < 4 / math.sqrt(rows), name
        assert abs(figures.var() - 1) < 4 * math.sqrt(8 / rows), name
    ends = exponential(torch.tensor([0, 2**31 - 1], dtype=torch.int32), torch.float64)
    torch.testing.assert_close(ends, torch.tensor([2.0**-32, 24 * math.log(2)], dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("probability", [1e-6, 1e-8, 1e-9])
def test_a_column_of_one_in_a_billion_keeps_its_share(probability):
    """Against one column with the rest, in full: the sum over the words w of e^(-E(w) / p), 2^-31 each, is p."""
    e = exponential(torch.arange(int(40 * probability * 2**31) + 10, dtype=torch.int32)).double()
    assert abs((-e / probability).exp().sum() * 2.0**-31 / probability - 1) < 0.01


@pytest.mark.skipif(not RUNS_TRITON, reason="needs a process that runs Triton source")
def test_numbers_of_the_kernels_interpreted():
    """The kernels' words are the same bits, their exponentials as exact near both ends."""
    N = 4096
    given = torch.cat([torch.arange(N // 4), torch.logspace(0, 31, N // 2, 2), 2**31 - 1 - torch.arange(N // 4)])
    given = given.long().clamp(max=2**31 - 1).int()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed, step, row_id in ((0, 0, 0), (2**62 + 3, 2**33 + 5, 2**40 + 7)):
        numbers = (torch.tensor(number, device=device) for number in (seed, step, row_id))
        words = torch.empty(N, dtype=torch.int32, device=device)
        ours, of_given = torch.empty(2, N, device=device)
        store_numbers[(1,)](words, ours, given.to(device), of_given, *numbers, BLOCK=N)
        expected = words_of(seed, step, torch.tensor([row_id]), N)[0]
        assert torch.equal(words.cpu(), expected)
        for found, truth in ((ours, expected), (of_given, given)):
            torch.testing.assert_close(found.cpu().double(), exponential(truth, torch.float64), rtol=1e-6, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", [{}, FILTERS[-1]], ids=str)
def test_a_captured_graph_reads_seed_and_step_anew(options):
    logits = torch.randn(5, 9000, device="cuda")
    seed, step = torch.tensor([1, 2], device="cuda")
    sample(logits, seed=seed, step=step, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(logits, seed=seed, step=step, **options)
    for numbers in ((1, 2), (1, 3), (4, 3)):
        seed.fill_(numbers[0]), step.fill_(numbers[1])
        graph.replay()
        eager = sample(logits, seed=numbers[0], step=numbers[1], **options)
        for ours, truth in zip(drawn, eager, strict=True):
            assert torch.equal(ours, truth)
