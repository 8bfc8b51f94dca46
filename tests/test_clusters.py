"""Errors over clusters against plain float64 and a bootstrap, and what two evaluations' records say of their change."""

import json
import math

import pytest
import torch

from distill.training import change_since
from distill.training.clusters import ClusterSums


def draw(count: int, seed: int = 0) -> tuple[ClusterSums, ClusterSums]:
    """Two evaluations of the same clusters, which are hard or easy in both and have other lengths in each."""
    generator = torch.Generator().manual_seed(seed)
    hardness = torch.randn(count, generator=generator, dtype=torch.float64)
    sides = []
    for level in (2.0, 1.5):
        cluster = torch.randint(3, 40, (count,), generator=generator)
        cluster = torch.arange(count).repeat_interleave(cluster)
        noise = torch.randn(len(cluster), generator=generator, dtype=torch.float64)
        order = torch.randperm(len(cluster), generator=generator)
        sides.append(ClusterSums.of((level + hardness[cluster] + 0.5 * noise)[order], cluster[order]))
    return tuple(sides)


def plain(sums: list[float], tokens: list[float]) -> tuple[float, list[float]]:
    """A ratio, and what each cluster moves it by."""
    ratio = sum(sums) / sum(tokens)
    return ratio, [(s - ratio * n) / sum(tokens) for s, n in zip(sums, tokens, strict=True)]


def spread(parts: list[float]) -> float:
    return math.sqrt(len(parts) / (len(parts) - 1) * sum(part**2 for part in parts))


@pytest.mark.parametrize("count", [2, 7, 100])
def test_both_errors_are_those_of_the_formula(count):
    before, after = draw(count)
    (old, old_parts), (new, new_parts) = (plain(*(x.tolist() for x in side)) for side in (before, after))
    assert (before.mean, before.standard_error) == pytest.approx((old, spread(old_parts)), rel=1e-12)
    expected = new - old, spread([b - a for a, b in zip(old_parts, new_parts, strict=True)])
    assert before.change_to(after) == pytest.approx(expected, rel=1e-9)


def test_values_are_added_up_by_cluster():
    found = ClusterSums.of(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1, 0, 1, 1]))
    assert found.sums.tolist() == [2, 13]
    assert found.tokens.tolist() == [1, 3]
    assert found.sums.dtype == found.tokens.dtype == torch.float64


def test_both_errors_are_those_of_a_bootstrap():
    before, after = draw(300)
    drawn = torch.randint(300, (4000, 300), generator=torch.Generator().manual_seed(1))
    old, new = (side.sums[drawn].sum(1) / side.tokens[drawn].sum(1) for side in (before, after))
    assert before.standard_error == pytest.approx(old.std().item(), rel=0.05)
    change, error = before.change_to(after)
    assert error == pytest.approx((new - old).std().item(), rel=0.05)
    assert error < 0.5 * math.hypot(before.standard_error, after.standard_error)
    assert abs(change + 0.5) < 4 * error


def test_without_change_there_is_no_error():
    before, _ = draw(9)
    assert before.change_to(before) == (0, 0)


def test_a_single_cluster_has_no_error():
    side = ClusterSums.of(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]))
    assert side.mean == 1.5
    assert math.isnan(side.standard_error)


# ---- Two records ---------------------------------------------------------------------------------------------------


def record(side: ClusterSums, prompts: str = "these") -> dict:
    """Of an evaluation, as it is read after a resume."""
    clusters = {"prompts": prompts, **side.record()}
    return json.loads(json.dumps({"reverse_kl": side.mean, "clusters": clusters}))


def figures(change: float | None, error: float | None) -> dict:
    return {"reverse_kl_change": change, "reverse_kl_change_standard_error": error}


def test_records_hold_every_bit_of_what_a_change_needs():
    before, after = draw(20)
    assert change_since(record(before), record(after)) == figures(*before.change_to(after))
    assert before.change_to(after)[0] == after.mean - before.mean


@pytest.mark.parametrize("other", ["older", "prompts", "count"])
def test_what_cannot_be_paired_has_a_change_without_an_error(other):
    (before, after), known = draw(20), "others" if other == "prompts" else "these"
    first = record(draw(19)[0] if other == "count" else before, known)
    if other == "older":
        del first["clusters"]
    last = record(after)
    assert change_since(first, last) == figures(last["reverse_kl"] - first["reverse_kl"], None)


def test_a_change_to_what_is_no_number_is_unknown():
    before, after = draw(5)
    after.sums[3] = math.nan
    last = record(after) | {"reverse_kl": math.nan}
    assert last["clusters"]["sums"][3] is None
    assert change_since(record(before), last) == figures(None, None)
