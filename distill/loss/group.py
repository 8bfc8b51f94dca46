"""What one optimizer step learns from: the rollouts of some prompts, and how they are cut and addressed.

Lengths and indices are on the host, where all plans are made; tokens and log-probabilities are where the models are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.loss.rollouts import Rollouts
from distill.runtime import to_device


class TeacherView(NamedTuple):
    """What M teachers see in the place of B prompts, and what the loss to each weighs."""

    prompts: Sequence[tuple[Tensor, Tensor]]
    """Of each teacher ids [B, P'] int64, left-padded, and their mask [B, P'] bool on the host."""
    weight: Tensor
    """[B, M] float32 on the host, 1 over the teachers of a prompt; 0: it is none of them, and sees nothing."""


class Group(NamedTuple):
    """Rollouts that share one optimizer step. Lengths and index stay on the host, so that nothing waits for them."""

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool, on the host
    completion_ids: Tensor  # [R, T] int64, right-padded
    completion_lengths: Tensor  # [R] int64, on the host
    prompt_index: Tensor  # [R] int64, on the host
    logprob: Tensor  # [R, T] float32: the student's at sampling
    sampling_logprob: Tensor | None = None  # [R, T] float32: of the distribution sampled from
    finished: Tensor | None = None  # [R] bool, on the host: not cut by length
    teacher_view: TeacherView | None = None  # None: the first teacher sees what the student sees
    task_advantage: Tensor | None = None  # [R] float32, on the host, nats
    written: Tensor | None = None  # [R] bool, on the host: an answer of a record, not the student's; None: none is

    @classmethod
    def of(cls, rollouts: Rollouts, teacher_view: TeacherView | None = None) -> "Group":
        """The group that some rollouts form."""
        mask, lengths = rollouts.prompt_mask.cpu(), rollouts.completion_lengths.cpu()
        index, logprobs = rollouts.prompt_index, (rollouts.logprob, rollouts.sampling_logprob)
        sampled = rollouts.completion_ids, lengths, index, *logprobs
        return cls(rollouts.prompt_ids, mask, *sampled, rollouts.finished.cpu(), teacher_view, rollouts.task_advantage)

    @property
    def lengths(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the prompts, of the completions, and which prompt each row has: what micro-batches are cut by."""
        return self.prompt_mask.sum(1), self.completion_lengths, self.prompt_index

    @property
    def seen_lengths(self) -> tuple[Tensor, Tensor, Tensor]:
        """`lengths` for the teachers: of each prompt the longest that one of its teachers sees."""
        if self.teacher_view is None:
            return self.lengths
        seen = torch.stack([mask.sum(1) for _, mask in self.teacher_view.prompts], 1)
        return seen.where(self.teacher_view.weight > 0, 0).amax(1), self.completion_lengths, self.prompt_index

    @property
    def weights(self) -> Tensor:
        """[R, M] float32 on the host: what the loss to each teacher weighs."""
        if self.teacher_view is None:
            return torch.ones(len(self.prompt_index), 1)
        return self.teacher_view.weight[self.prompt_index]

    def seen_by(self, teacher: int) -> "Group":
        """The same completions after the prompts that a teacher sees."""
        if self.teacher_view is None:
            return self
        prompt_ids, prompt_mask = self.teacher_view.prompts[teacher]
        return self._replace(prompt_ids=to_device(prompt_ids, self.prompt_ids.device), prompt_mask=prompt_mask)

    def by_teacher(self, micro_batches: Sequence[Tensor]) -> list[tuple[int, list[Tensor]]]:
        """Each teacher with its rows of every micro-batch in which it has any."""
        scored = enumerate((self.weights > 0).unbind(1))
        found = ((t, [part for rows in micro_batches if len(part := rows[of_t[rows]])]) for t, of_t in scored)
        return [(teacher, parts) for teacher, parts in found if parts]

    @property
    def starts(self) -> Tensor:
        """[R + 1] int64: where each row begins among the K valid tokens."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.completion_lengths.cumsum(0)])

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Indices among the K valid tokens of the given rows' tokens, in the order of `rows`."""
        starts = self.starts
        return torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])

    def valid(self, values: Tensor, rows: Tensor) -> Tensor:
        """[R, T] to the valid entries of `rows`, flattened: masked by length, never by the padding id."""
        lengths = self.completion_lengths[rows]
        mask = torch.arange(values.shape[1]) < lengths[:, None]
        index = (rows[:, None] * values.shape[1] + torch.arange(values.shape[1]))[mask]
        return values.flatten()[to_device(index, values.device)]

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What `completion_hidden` takes, for some rows and the prompts they need."""
        prompts, index = self.prompt_index[rows].unique(return_inverse=True)
        lengths = self.completion_lengths[rows]
        device = self.completion_ids.device
        return (
            self.prompt_ids[to_device(prompts, device)],
            self.prompt_mask[prompts],
            self.completion_ids[to_device(rows, device), : max(1, int(lengths.max()))],
            lengths,
            index,
        )
