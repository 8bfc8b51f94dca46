"""Errors of a mean over tokens that depend on each other within a cluster, and of the change between two such means.

A cluster is a prompt with all its rollouts. What is kept of it are two numbers, so that a record of a few kilobytes can
be compared with a later one.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ClusterSums(NamedTuple):
    """A figure's sum over each cluster's tokens and their number, both [C] float64 on the host.

    The mean R = sum_c S_c / sum_c n_c is a ratio, since clusters differ in length. To first order cluster c moves it by
    e_c = (S_c - R n_c) / sum n, and with independent clusters its variance is C / (C - 1) sum_c e_c^2 (Cochran,
    Sampling Techniques, chapter 6).
    """

    sums: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, values: Tensor, cluster: Tensor) -> "ClusterSums":
        """Adds up values [K], wherever they are, by their clusters [K] int64 on the host, which are numbered from 0."""
        return cls(cluster.bincount(weights=values.double().cpu()), cluster.bincount().double())

    def of_label(self, labels: Sequence[str]) -> "dict[str, ClusterSums]":
        """The clusters of each label; a cluster has one."""
        which = {label: torch.tensor([each == label for each in labels]) for label in dict.fromkeys(labels)}
        return {label: ClusterSums(self.sums[own], self.tokens[own]) for label, own in which.items()}

    @property
    def mean(self) -> float:
        """Over all tokens."""
        return (self.sums.sum() / self.tokens.sum()).item()

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN with one cluster."""
        return _error(self._parts())

    def change_to(self, after: "ClusterSums") -> tuple[float, float]:
        """How much the mean has grown `after`, in the same clusters in the same order, and the standard error of that.

        Each cluster moves the change by the difference of its two e_c: what both have in common in it, how hard it is
        and which random numbers it drew, cancels. How long a cluster is may differ between the two.
        """
        return after.mean - self.mean, _error(after._parts() - self._parts())

    def _parts(self) -> Tensor:
        """[C]: the e_c, which add up to 0."""
        return (self.sums - self.mean * self.tokens) / self.tokens.sum()

    def record(self) -> dict[str, list[float | None]]:
        """As JSON, null for what is not finite; `of_record` reads it."""
        sums = [number if math.isfinite(number) else None for number in self.sums.tolist()]
        return {"sums": sums, "tokens": self.tokens.long().tolist()}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "ClusterSums":
        sums = [math.nan if number is None else number for number in record["sums"]]
        return cls(torch.tensor(sums, dtype=torch.float64), torch.tensor(record["tokens"], dtype=torch.float64))


def _error(parts: Tensor) -> float:
    """Standard error of what the parts of independent clusters add up to."""
    count = len(parts)
    return (parts.square().sum() * count / (count - 1)).sqrt().item() if count > 1 else math.nan
