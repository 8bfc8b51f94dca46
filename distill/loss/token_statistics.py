"""The statistics of a group's tokens without gradients: for evaluations, and for whoever wants to look."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.loss.gradients import in_row_order
from distill.loss.group import Group
from distill.loss.head_pair import HeadPair
from distill.loss.model_parts import ModelParts
from distill_kernels import TokenStats


@torch.no_grad()
def statistics(
    student: ModelParts,
    teachers: Sequence[ModelParts],
    group: Group,
    micro_batches: Sequence[Tensor],
    *,
    vocab_size: int | None = None,
    teacher_hidden: Sequence[Tensor] | None = None,
) -> TokenStats:
    """The statistics of a group's K tokens without gradients, row 0's first.

    `teacher_hidden` is what `score` gave for the group, where it is known.
    """
    seen, parts, micro_batches = group.for_teachers, [], group.by_teacher(micro_batches)
    for index, of_teacher in itertools.groupby(micro_batches, group.teacher_of):
        heads = HeadPair(student, teachers[index], 1.0, vocab_size)
        with heads.teacher.present():
            for rows in of_teacher:
                known = teacher_hidden and torch.cat([teacher_hidden[row] for row in rows.tolist()])
                theirs = heads.teacher.hidden(*seen.inputs(rows)) if known is None else known
                hidden, ids = student.hidden(*group.inputs(rows)), group.valid(group.completion_ids, rows)
                parts.append(heads.statistics(hidden, theirs, ids))
    return in_row_order(parts, group, micro_batches)
