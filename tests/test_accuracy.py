"""Means and pass@k against enumeration and closed forms, and what their intervals promise."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.training.accuracy import Judged, Tally, judged_figures, pass_at, pass_figures, record_metrics, wilson


def tally(*prompts: list[float | None]) -> Tally:
    """Of the values of each prompt's completions."""
    return Tally.of([value for values in prompts for value in values], len(prompts[0]))


def same(found, *expected) -> bool:
    return tuple(found) == tuple(pytest.approx(x, abs=1e-12) if x is not None else None for x in expected)


def test_pass_at_k_is_the_share_of_draws_with_a_success():
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        for c in range(n + 1):
            (found,) = pass_at(torch.tensor([n], dtype=torch.float64), torch.tensor([c], dtype=torch.float64), k)
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            if draws:
                assert found.item() == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
            else:
                assert found.isnan()


def test_pass_at_k_of_very_many_completions_stays_in_range():
    n, c = torch.tensor([60_000.0] * 2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert pass_at(n, c, 30_000).tolist() == [0, pytest.approx(0.5)]


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_the_figures_are_of_powers_of_two_and_of_all(n, ks):
    assert pass_figures(n) == {f"avg@{n}": None} | {f"pass@{k}": k for k in ks}


@pytest.mark.parametrize(("p", "n"), [(0.0, 24), (1.0, 24), (0.3, 10), (0.5, 1.7)])
def test_wilson_s_bounds_are_where_the_score_test_ends(p, n):
    found = wilson(p, n)
    for bound in (found.low, found.high):
        assert (p - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, abs=1e-12)
    assert found.low <= p <= found.high


def test_no_success_and_nothing_but_success_are_not_certain():
    nothing = tally(*[[0.0] * 4] * 24)
    assert same(nothing.estimate(1), 0, 0, 1.96**2 / (24 + 1.96**2))
    assert same(nothing.estimate(4), 0, 0, 1.96**2 / (24 + 1.96**2))
    assert same(tally(*[[1.0] * 4] * 24).estimate(2), 1, 24 / (24 + 1.96**2), 1)


def test_means_and_pass_at_k_over_prompts():
    found = tally([1.0, 0.5], [0.0, 0.0], [1.0, 2.0])
    each = torch.tensor([0.75, 0, 1.5], dtype=torch.float64)
    half = 1.96 * each.std().item() / math.sqrt(3)
    assert same(found.estimate(None), 0.75, 0.75 - half, 0.75 + half)
    assert found.estimate(1).mean == pytest.approx(0.5)  # half of one prompt's, none, all
    assert found.estimate(2).mean == pytest.approx(2 / 3)
    # The error of pass@1 is that of (1/2, 0, 1), sqrt(1/12), as of p (1 - p) / error^2 = 3 observations.
    assert same(found.estimate(1), *wilson(0.5, 3))


def test_rollouts_that_differ_within_prompts_only_count_each():
    """All prompts alike: nothing says that rollouts of one prompt depend on each other."""
    assert same(tally(*[[1.0, 0.0]] * 5).estimate(1), *wilson(0.5, 10))


def test_of_one_prompt_the_interval_is_over_its_rollouts():
    found = tally([1.0, 0.0, 0.0, 1.0])
    half = 1.96 * math.sqrt(1 / 3) / 2
    assert same(found.estimate(None), 0.5, 0.5 - half, 0.5 + half)
    assert same(found.estimate(1), *wilson(0.5, 3))
    assert same(found.estimate(2), 5 / 6, None, None)
    assert same(tally([0.0]).estimate(None), 0, None, None)
    assert same(tally([0.0]).estimate(1), *wilson(0, 1))
    assert same(found.change_to(tally([1.0, 1.0, 1.0, 1.0]), 2), 1 / 6, None, None)


def test_what_a_metric_has_no_say_on_is_left_out():
    found = tally([1.0, None, None], [0.0, 0.0, None], [None, None, None], [1.0, 1.0, 0.0])
    for figure in (None, 1):
        assert found.estimate(figure).mean == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert found.estimate(2).mean == pytest.approx((0 + 1) / 2)  # of the prompts with two that were judged
    assert same(tally([None], [None]).estimate(None), None, None, None)
    assert same(tally([None], [None]).estimate(1), None, None, None)
    assert same(found.change_to(tally([None] * 3, [None] * 3, [1.0] * 3, [None] * 3), 1), None, None, None)


values = st.sampled_from([None, 0.0, 0.25, 1.0, 3.0])
tables = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.tuples(*[st.lists(values, min_size=n, max_size=n)] * 2), min_size=1, max_size=6)
)


@given(tables)
@settings(deadline=None)
def test_every_interval_is_about_its_figure_and_shares_stay_shares(table):
    before, after = (tally(*side) for side in zip(*table, strict=True))
    for name, k in pass_figures(before.rollouts).items():
        found, change = before.estimate(k), before.change_to(after, k)
        for estimate, lowest in ((found, 0), (change, -1)):
            assert (estimate.low is None) == (estimate.high is None)
            if estimate.low is not None:
                assert estimate.low <= estimate.mean <= estimate.high
                assert name.startswith("avg") or estimate.low - lowest >= -1e-12
                assert name.startswith("avg") or estimate.high <= 1 + 1e-12
        kept = Tally.of_record(json.loads(json.dumps(before.record())))
        assert kept.change_to(after, k) == change
        assert kept.estimate(k) == found


def test_a_change_is_of_each_prompt_with_itself():
    before, after = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    found = tally(*before).change_to(tally(*after), None)
    change = torch.tensor([0.5, 0.5, 0, 0.5], dtype=torch.float64)
    half = 1.96 * change.std().item() / 2
    assert same(found, 0.375, 0.375 - half, 0.375 + half)
    alone = tally(*after).estimate(None)
    assert found.high - found.low < alone.high - alone.low + 2 * 0.4  # hard prompts and easy ones cancel


def test_a_change_from_nothing_to_nothing_is_not_certain():
    nothing = tally(*[[0.0]] * 24)
    high = wilson(0, 24).high
    assert same(nothing.change_to(nothing, 1), 0, -high, high)


def test_intervals_hold_what_they_promise():
    """Prompts of which some are hard and some easy, many times: 95 % of the intervals hold the truth, or some more."""
    generator = torch.Generator().manual_seed(0)
    times, prompts, rollouts = 200, 24, 4
    held = dict.fromkeys(["mean", "pass@1", "pass@4", "change"], 0)
    for _ in range(times):
        chance = torch.rand(prompts, generator=generator) ** 2  # a mean of 1/3, and after it of 1/2
        noise = torch.rand(prompts, rollouts, generator=generator)
        before, after = (noise < p[:, None] for p in (chance, chance.sqrt()))
        found, then = (Tally.of(each.double().flatten().tolist(), rollouts) for each in (before, after))
        truth = {
            "mean": (found.estimate(None), 1 / 3),
            "pass@1": (found.estimate(1), 1 / 3),
            "pass@4": (found.estimate(4), 1 - sum((-1) ** i * math.comb(4, i) / (2 * i + 1) for i in range(5))),
            "change": (found.change_to(then, 1), 1 / 2 - 1 / 3),
        }
        for name, (estimate, value) in truth.items():
            held[name] += estimate.low <= value <= estimate.high
    assert all(0.92 * times <= count < times for count in held.values()), held


def test_the_record_of_an_evaluation_holds_what_the_next_is_compared_by():
    first, second, other = ({"clusters": {"prompts": prompts}} for prompts in ("a", "a", "b"))
    record_metrics(first, {"good": Judged([0.0, 0.0, 1.0, 0.0])}, 2, None)
    assert "change" not in first["metrics"]["good"]["pass@1"]
    judged = Judged([0.0, 1.0, 1.0, 0.0], failed=1, reason="why")
    for record in (second, other):
        record_metrics(record, {"good": judged, "new": judged}, 2, json.loads(json.dumps(first)))
    assert first["clusters"]["metrics"] == {"good": {"rollouts": 2, "sums": [0, 1], "successes": [0, 1]}}
    figures = second["metrics"]["good"]
    assert list(figures) == ["avg@2", "pass@1", "pass@2", "failed"]
    assert figures["failed"] == 1
    change = tally([0.0, 0.0], [1.0, 0.0]).change_to(tally([0.0, 1.0], [1.0, 0.0]), 2)
    assert figures["pass@2"]["change"] == change._asdict()
    assert other["metrics"]["good"]["pass@2"]["change"] == {"mean": 0.5, "low": None, "high": None}
    assert second["metrics"]["new"] == judged_figures(judged, 2)  # which the first evaluation had not
    none = {"clusters": {"prompts": "a"}}
    record_metrics(none, {}, 2, first)
    assert none == {"clusters": {"prompts": "a"}}
