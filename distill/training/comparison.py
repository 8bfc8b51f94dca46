"""Two models over the same completions: both exact divergences, agreement and perplexities, each with its interval."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill.loss import AGREEMENT_TOKENS, Group, HeadPair
from distill.runtime import MemoryLimits
from distill.training.clusters import ClusterSums
from distill.training.evaluation import clusters_of


class Figure(NamedTuple):
    """A mean over tokens with its 95 % interval, which is over clusters of them that are independent."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor, cluster: Tensor) -> "Figure":
        sums = ClusterSums.of(values, cluster)
        mean, half = sums.mean, 1.96 * sums.standard_error
        return cls(mean, mean - half, mean + half)

    def exp(self) -> "Figure":
        return Figure(*map(math.exp, self))


@torch.no_grad()
def compare(heads: HeadPair, group: Group, limits: MemoryLimits) -> dict[str, Figure]:
    """Both exact divergences, the agreement of the likeliest tokens and both perplexities, over a group's tokens."""
    swapped = heads._replace(student=heads.teacher, teacher=heads.student)

    def measure(parts: list[Tensor]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for rows in parts:
            inputs, ids = group.inputs(rows), group.valid(group.completion_ids, rows)
            ours, theirs = heads.student.hidden(*inputs), heads.teacher.hidden(*inputs)
            stats = heads.statistics(ours, theirs, ids)
            forward = swapped.statistics(theirs, ours, ids)
            tokens = zip(ours.split(AGREEMENT_TOKENS), theirs.split(AGREEMENT_TOKENS), strict=True)
            for name, values in {
                "reverse_kl": stats.reverse_kl,
                "forward_kl": forward.reverse_kl,
                "top_token_agreement": torch.cat([heads.agreement(*both) for both in tokens]),
                "student_perplexity": -stats.student_logprob,
                "teacher_perplexity": -stats.teacher_logprob,
                "cluster": clusters_of(group)[rows].repeat_interleave(group.completion_lengths[rows]),
            }.items():
                found.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in found.items()}

    found = limits.in_micro_batches("evaluation", group.lengths, measure)
    cluster = found.pop("cluster")
    figures = {name: Figure.of(values, cluster) for name, values in found.items()}
    return {name: figure.exp() if name.endswith("perplexity") else figure for name, figure in figures.items()}
