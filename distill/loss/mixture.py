"""A micro-batch divided among its teachers, and of each into rollouts and written answers, whose objectives differ.

Of a mixture of teachers, a row's loss is the weighted sum of its losses to each.
Rewards, divergences and entropies are weighted alike, so that what is said of a token is what it was trained on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.loss.group import Group
from distill.runtime import to_device
from distill_kernels import TokenStats


class Share(NamedTuple):
    """What one teacher scores of a micro-batch of K tokens, of rollouts or of written answers."""

    teacher: int
    rows: Tensor  # [r]
    tokens: Tensor | None  # [k] int64: which of the K; None for all of them, with weight 1
    weight: Tensor | None  # [k] float32: of the loss to this teacher
    written: bool = False

    def of(self, values: Tensor | None) -> Tensor | None:
        """The teacher's part [k, ..] of [K, ..]."""
        return values if self.tokens is None or values is None else values[self.tokens]

    def weigh(self, values: Tensor) -> Tensor:
        """[.., k] as they count beside those of the other teachers."""
        return values if self.weight is None else values * self.weight


def shares(group: Group, rows: Tensor) -> list[Share]:
    """The shares of the teachers of some rows, tokens in the order of `rows`."""
    found, device = [], group.completion_ids.device
    written = None if group.written is None else group.written[rows]
    for teacher, of_teacher in enumerate(group.weights[rows].unbind(1)):
        for kind in (False,) if written is None else (False, True):
            weight = of_teacher if written is None else of_teacher.where(written == kind, 0)
            if (weight == 1).all():
                return [Share(teacher, rows, None, None, kind)]
            if (weight > 0).any():
                of_token = weight.repeat_interleave(group.completion_lengths[rows])
                tokens = of_token.nonzero()[:, 0]
                index, weights = to_device(tokens, device), to_device(of_token[tokens], device)
                found.append(Share(teacher, rows[weight > 0], index, weights, kind))
    return found


def mixed(found: Sequence[tuple[Share, TokenStats]], count: int) -> TokenStats:
    """The statistics [K] of a micro-batch of `count` tokens from those of each share."""
    if found[0][0].tokens is None:
        return found[0][1]
    total = found[0][1].reward.new_zeros(len(TokenStats._fields), count)
    for share, stats in found:  # of a teacher each token once, so that sums have one order
        total.index_add_(1, share.tokens, share.weigh(torch.stack(list(stats))))
    return TokenStats(*total)
