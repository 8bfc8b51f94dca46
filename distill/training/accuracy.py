"""What a metric finds of the completions of held-out prompts: its mean and pass@k, each with a 95 % interval.

A completion has a value, or none where the metric had no say; a value of 1 or more is a success. P prompts have N
rollouts each. Intervals are over C clusters: the prompts, since rollouts of one prompt are alike; of a single prompt
its rollouts, as then the figure is about that prompt alone. Every prompt counts the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Z = 1.96  # standard errors of a normal distribution that 95 % are within
SUCCESS = 1.0


class Judged(NamedTuple):
    """What one metric says of some completions."""

    values: list[float | None]
    """None where it has no say."""
    failed: int = 0
    """Completions on which it could not be computed, which count as 0."""
    reason: str | None = None
    """Why, of the first of them."""


class Estimate(NamedTuple):
    """A figure with its 95 % interval; None is what cannot be known."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Tally:
    """A metric's findings by cluster, [C] float64 each: all that figures and later comparisons are made of."""

    sums: Tensor
    """Of the values."""
    successes: Tensor
    judged: Tensor
    """Completions that it had a say on."""
    rollouts: int
    """N."""
    one_prompt: bool
    """Whether the clusters are the rollouts of a single prompt."""

    @classmethod
    def of(cls, values: Sequence[float | None], num_rollouts: int) -> "Tally":
        """Of the values of P·N completions, prompt after prompt."""
        known = torch.tensor([value is not None for value in values])
        found = torch.tensor([value or 0.0 for value in values], dtype=torch.float64)
        one_prompt = len(values) == num_rollouts
        shape = (-1, 1) if one_prompt else (-1, num_rollouts)
        parts = (found, (found >= SUCCESS).double(), known.double())
        return cls(*(part.view(shape).sum(1) for part in parts), num_rollouts, one_prompt)

    def record(self) -> dict[str, Any]:
        """As JSON, which `of_record` reads; `judged` where the metric had no say on some."""
        whole = 1 if self.one_prompt else self.rollouts
        return (
            {"rollouts": self.rollouts, "sums": self.sums.tolist(), "successes": self.successes.long().tolist()}
            | ({"one_prompt": True} if self.one_prompt else {})
            | ({"judged": self.judged.long().tolist()} if (self.judged != whole).any() else {})
        )

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Tally":
        sums, successes = (torch.tensor(record[name], dtype=torch.float64) for name in ("sums", "successes"))
        one_prompt = record.get("one_prompt", False)
        whole = [1 if one_prompt else record["rollouts"]] * len(sums)
        judged = torch.tensor(record.get("judged", whole), dtype=torch.float64)
        return cls(sums, successes, judged, record["rollouts"], one_prompt)

    def each(self, k: int | None) -> Tensor:
        """A figure of every cluster, [C] or [P]; NaN where too few completions were judged."""
        if k is None:
            return self.sums / self.judged
        n, c = self.judged, self.successes
        if self.one_prompt and k > 1:
            n, c = n.sum()[None], c.sum()[None]
        return pass_at(n, c, k)

    def estimate(self, k: int | None) -> Estimate:
        """A figure over all clusters."""
        each = self.each(k)
        known = each.isfinite()
        each = each[known]
        if not len(each):
            return Estimate()
        mean = each.mean().item()
        if k is None:
            return _about(mean, _error(each))
        if self.one_prompt and k > 1:
            return Estimate(mean)
        return wilson(mean, self._observations(each, self.judged[known].sum().item()))

    @staticmethod
    def _observations(each: Tensor, completions: float) -> float:
        """How many independent successes and failures would say as much as these clusters do."""
        mean, error = each.mean().item(), _error(each)
        if error and math.isfinite(error):
            return min(mean * (1 - mean) / error**2, completions)
        return len(each) if mean in (0, 1) else completions

    def change_to(self, after: "Tally", k: int | None) -> Estimate:
        """How much a figure has grown `after`, cluster by cluster of those that both have.

        The interval is what is left when what both have in common in a cluster cancels. That of a pass@k comes from the
        intervals of both and their correlation (Newcombe 1998, Statistics in Medicine 17, 2635, method 10), so that no
        success before and after is not taken for certainty.
        """
        one, other = self.each(k), after.each(k)
        if len(one) != len(other):
            return self.difference_to(after, k)
        known = one.isfinite() & other.isfinite()
        if not known.any():
            return Estimate()
        one, other = one[known], other[known]
        change = (other - one).mean().item()
        if k is None or len(one) == 1:
            return _about(change, _error(other - one))
        (p, low, high), (q, low_after, high_after) = (
            wilson(of.mean().item(), self._observations(of, tally.judged[known].sum().item()))
            for of, tally in ((one, self), (other, after))
        )
        alike = _correlation(one, other)
        down, up = (_hypot(a, b, alike) for a, b in ((q - low_after, high - p), (high_after - q, p - low)))
        return Estimate(change, change - down, change + up)

    def difference_to(self, after: "Tally", k: int | None) -> Estimate:
        """The same where clusters are not alike, without an interval."""
        before, now = self.estimate(k).mean, after.estimate(k).mean
        return Estimate(None if before is None or now is None else now - before)


def pass_figures(num_rollouts: int) -> dict[str, int | None]:
    """The figures of a metric by name: None for the mean, and the k of each pass@k: 1, 2, 4, ... up to N, and N."""
    powers = {2**power for power in range(num_rollouts.bit_length())}
    return {f"avg@{num_rollouts}": None} | {f"pass@{k}": k for k in sorted({*powers, num_rollouts})}


def pass_at(n: Tensor, c: Tensor, k: int) -> Tensor:
    """Chance that of k completions drawn without replacement from n, c of them successes, one is a success; [C].

    1 - C(n - c, k) / C(n, k), without bias (Chen et al. 2021, arXiv 2107.03374), as a product, which stays in range.
    NaN where n is below k.
    """
    drawn = torch.arange(k, dtype=torch.float64)
    left = (n - c)[:, None] - drawn
    missed = (left.clamp(min=0) / (n[:, None] - drawn)).prod(1)
    return torch.where(n >= k, 1 - missed, torch.nan)


def wilson(p: float, n: float) -> Estimate:
    """A share p of n observations with Wilson's score interval (1927, JASA 22, 209), which stays within 0 and 1."""
    shrink = 1 + Z**2 / n
    middle, half = (p + Z**2 / (2 * n)) / shrink, Z / shrink * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def judged_figures(judged: Judged, num_rollouts: int) -> dict[str, Any]:
    """A metric's figures by name, each with `mean`, `low` and `high`, and on how many completions it `failed`."""
    tally = Tally.of(judged.values, num_rollouts)
    figures = {figure: tally.estimate(k)._asdict() for figure, k in pass_figures(num_rollouts).items()}
    return figures | {"failed": judged.failed}


def record_metrics(
    record: dict[str, Any], judged: Mapping[str, Judged], num_rollouts: int, first: Mapping[str, Any] | None
) -> None:
    """Adds what metrics said of an evaluation's completions to its record, whose `clusters` name its prompts.

    Where there was a `first` evaluation, changes since then too; without an interval where it had other prompts.
    """
    if not judged:
        return
    before, clusters = (first or {}).get("clusters", {}), record["clusters"]
    same = before.get("prompts") == clusters["prompts"]
    record["metrics"], clusters["metrics"] = {}, {}
    for name, found in judged.items():
        figures, tally = judged_figures(found, num_rollouts), Tally.of(found.values, num_rollouts)
        if old := before.get("metrics", {}).get(name):
            earlier = Tally.of_record(old)
            for figure, k in pass_figures(num_rollouts).items():
                change = earlier.change_to(tally, k) if same else earlier.difference_to(tally, k)
                figures[figure]["change"] = change._asdict()
        record["metrics"][name], clusters["metrics"][name] = figures, tally.record()


def _about(mean: float, error: float) -> Estimate:
    return Estimate(mean, mean - Z * error, mean + Z * error) if math.isfinite(error) else Estimate(mean)


def _error(each: Tensor) -> float:
    """Standard error of the mean of independent figures; NaN of one."""
    return (each.std() / math.sqrt(len(each))).item() if len(each) > 1 else math.nan


def _correlation(one: Tensor, other: Tensor) -> float:
    """0 where one of them does not vary."""
    found = torch.corrcoef(torch.stack([one, other]))[0, 1].item()
    return found if math.isfinite(found) else 0.0


def _hypot(a: float, b: float, alike: float) -> float:
    """Length of the sum of two errors of which so much is the same and cancels."""
    return math.sqrt(max(a * a - 2 * alike * a * b + b * b, 0.0))
