"""A micro-batch divided among its teachers, and their statistics as one: of a mixture of teachers, the loss of a row is
the weighted sum of its losses to each of them.

Rewards, divergences and entropies are weighted alike, so that what is said of a token is what it was trained on.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from distill.loss.group import Group
from distill.runtime import to_device
from distill_kernels import TokenStats

TeacherStates = dict[tuple[int, int], Tensor]
"""By teacher and row, hidden states [T_r, Ht]; without the rows that are in no micro-batch."""


class Share(NamedTuple):
    """What one teacher scores of a micro-batch of K tokens."""

    teacher: int
    rows: list[int]
    tokens: Tensor | None
    """[k] int64: which of the K tokens; None for all of them, with weight 1."""
    weight: Tensor | None
    """[k] float32: of the loss to this teacher."""

    def states(self, found: TeacherStates) -> list[Tensor | None]:
        """Of each row; None for one that was not scored."""
        return [found.get((self.teacher, row)) for row in self.rows]

    def of(self, values: Tensor | None) -> Tensor | None:
        """The teacher's part [k, ..] of [K, ..]."""
        return values if self.tokens is None or values is None else values[self.tokens]

    def weigh(self, values: Tensor) -> Tensor:
        """[k] as they count beside those of the other teachers."""
        return values if self.weight is None else values * self.weight


def shares(group: Group, rows: Tensor) -> list[Share]:
    """The shares of the teachers of some rows, tokens in the order of `rows`."""
    weights, lengths, device = group.weights[rows], group.completion_lengths[rows], group.completion_ids.device
    found = []
    for teacher, weight in enumerate(weights.unbind(1)):
        if (weight == 1).all():
            return [Share(teacher, rows.tolist(), None, None)]
        if (weight > 0).any():
            of_token = weight.repeat_interleave(lengths)
            tokens = (of_token > 0).nonzero()[:, 0]
            placed = to_device(tokens, device), to_device(of_token[tokens], device)
            found.append(Share(teacher, rows[weight > 0].tolist(), *placed))
    return found


def mixed(found: Sequence[TokenStats], parts: Sequence[Share], count: int) -> TokenStats:
    """The statistics [K] of a micro-batch of `count` tokens from those of each share."""
    if parts[0].tokens is None:
        return found[0]

    def sum_of(columns: Sequence[Tensor]) -> Tensor:
        total = columns[0].new_zeros(count)
        for values, share in zip(columns, parts, strict=True):
            total.index_add_(0, share.tokens, share.weigh(values))  # of a teacher each token once: in one order
        return total

    return TokenStats(*(sum_of(columns) for columns in zip(*found, strict=True)))
