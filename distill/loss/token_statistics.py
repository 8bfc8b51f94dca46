"""The statistics of a group's tokens without gradients: for evaluations, and for whoever wants to look."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.loss.gradients import in_row_order
from distill.loss.group import Group
from distill.loss.head_pair import HeadPair, TeacherStates
from distill.loss.model_parts import ModelParts
from distill.runtime import to_device
from distill_kernels import TokenStats


def over_teachers(
    teachers: Sequence[ModelParts],
    group: Group,
    micro_batches: Sequence[Tensor],
    measure: Callable[[int, Tensor], Tensor],
) -> Tensor | None:
    """[n, K] over a group's K tokens, each teacher's weighted: `measure` gives [n, k] of a teacher and some rows.

    None where there are no rows. A row that is in several micro-batches counts once.
    """
    total, K = None, int(group.completion_lengths.sum())
    for teacher, parts in group.by_teacher(micro_batches):
        with teachers[teacher].present():
            found = torch.cat([measure(teacher, rows) for rows in parts], 1)
        tokens = to_device(torch.cat([group.tokens_of(rows) for rows in parts]), found.device)
        weight = group.weights[:, teacher].repeat_interleave(group.completion_lengths)
        placed = found.new_zeros(len(found), K).index_copy(1, tokens, found) * to_device(weight, found.device)
        total = placed if total is None else total + placed
    return total


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
    pairs = [HeadPair(student, teacher, 1.0, vocab_size) for teacher in teachers]

    def measure(teacher: int, rows: Tensor) -> Tensor:
        heads, hidden = pairs[teacher], student.hidden(*group.inputs(rows))
        if teacher_hidden is None:
            theirs = heads.teacher.hidden(*group.seen_by(teacher).inputs(rows))
        else:
            theirs = heads.theirs(teacher_hidden, teacher, rows, hidden)
        return torch.stack(list(heads.statistics(hidden, theirs, group.valid(group.completion_ids, rows))))

    found = over_teachers(teachers, group, micro_batches, measure)
    return in_row_order([], group, []) if found is None else TokenStats(*found)
