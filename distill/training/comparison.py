"""Two models over the same completions: both exact divergences, agreement and perplexities, each with its interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.loss import AGREEMENT_TOKENS, Group, HeadPair, ModelParts, over_teachers
from distill.runtime import MemoryLimits
from distill.training.clusters import ClusterSums
from distill.training.evaluation import clusters_of

NAMES = ("reverse_kl", "forward_kl", "top_token_agreement", "student_perplexity", "teacher_perplexity")


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
def compare(
    student: ModelParts, teachers: Sequence[ModelParts], group: Group, limits: MemoryLimits, vocab_size: int | None
) -> dict[str, Figure]:
    """Both exact divergences, the agreement of the likeliest tokens and both perplexities, over a group's tokens.

    Each teacher scores what the group says that it sees; of a mixture of teachers figures are weighted.
    """

    def measure(teacher: int, rows: Tensor) -> Tensor:
        return _of_rows(HeadPair(student, teachers[teacher], 1.0, vocab_size), group, group.seen_by(teacher), rows)

    values = limits.in_micro_batches(
        "evaluation", group.seen_lengths, lambda parts: over_teachers(teachers, group, parts, measure)
    )
    cluster = clusters_of(group).repeat_interleave(group.completion_lengths)
    figures = {name: Figure.of(of_one, cluster) for name, of_one in zip(NAMES, values, strict=True)}
    return {name: figure.exp() if name.endswith("perplexity") else figure for name, figure in figures.items()}


def _of_rows(heads: HeadPair, group: Group, seen: Group, rows: Tensor) -> Tensor:
    """[n, k] of the k tokens of some rows, in the order of NAMES."""
    swapped = heads._replace(student=heads.teacher, teacher=heads.student)
    ids, ours = group.valid(group.completion_ids, rows), heads.student.hidden(*group.inputs(rows))
    theirs = heads.teacher.hidden(*seen.inputs(rows))
    stats, forward = heads.statistics(ours, theirs, ids), swapped.statistics(theirs, ours, ids)
    tokens = zip(ours.split(AGREEMENT_TOKENS), theirs.split(AGREEMENT_TOKENS), strict=True)
    agreement = torch.cat([heads.agreement(*both) for both in tokens]).float()
    return torch.stack(
        [stats.reverse_kl, forward.reverse_kl, agreement, -stats.student_logprob, -stats.teacher_logprob]
    )
