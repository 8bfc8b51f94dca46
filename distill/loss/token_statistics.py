"""The statistics of a group's tokens without gradients: for evaluations, and for whoever wants to look."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.loss.gradients import in_row_order
from distill.loss.group import Group
from distill.loss.head_pair import HeadPair, TeacherStates
from distill.loss.model_parts import ModelParts
from distill.runtime import to_device
from distill_kernels import TokenStats


@torch.no_grad()
def statistics(
    student: ModelParts,
    teachers: Sequence[ModelParts],
    group: Group,
    micro_batches: Sequence[Tensor],
    *,
    vocab_size: int | None = None,
    teacher_hidden: TeacherStates | None = None,
) -> TokenStats:
    """The statistics of a group's K tokens without gradients, row 0's first; of a mixture of teachers, weighted.

    `teacher_hidden` is what `score` gave for the group, where it is known.
    """
    total = None
    for teacher, parts in group.by_teacher(micro_batches):
        heads, seen, found = HeadPair(student, teachers[teacher], 1.0, vocab_size), group.seen_by(teacher), []
        with heads.teacher.present():
            for rows in parts:
                known = teacher_hidden and torch.cat([teacher_hidden[teacher, row] for row in rows.tolist()])
                theirs = heads.teacher.hidden(*seen.inputs(rows)) if known is None else known
                hidden, ids = student.hidden(*group.inputs(rows)), group.valid(group.completion_ids, rows)
                found.append(heads.statistics(hidden, theirs, ids))
        weight = group.weights[:, teacher].repeat_interleave(group.completion_lengths)
        of_teacher = torch.stack(list(in_row_order(found, group, parts))) * to_device(weight, hidden.device)
        total = of_teacher if total is None else total + of_teacher
    return in_row_order([], group, []) if total is None else TokenStats(*total)
