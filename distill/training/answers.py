"""Written answers of a prompt set as if they were rollouts: sequences that the student did not sample.

Which answers a step has is a function of the seed and of the step alone. What the student's log-probabilities were
when an answer was written nobody knows, so those are NaN, and no sampled objective is of use there.
"""

from collections.abc import Sequence

import torch

from distill.loss import Rollouts, TeacherView
from distill.prompts import PromptSet, epoch_order, left_pad
from distill.runtime import to_device
from distill.teachers import TeacherPrompts

FIRST_EPOCH = 500_000  # of the answers' orders, so that these are not those of the prompts


class Answers:
    """The answered prompts of a set, by their indices in it."""

    def __init__(
        self,
        prompts: PromptSet,
        teacher: TeacherPrompts | None,
        pad_token_id: int,
        device: torch.device,
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        """`teacher` is what the teachers see of the set, where that differs from what the student does."""
        self.prompts, self._teacher, self._pad, self._device = prompts, teacher, pad_token_id, device
        self._seed, self._shuffle = seed, shuffle
        self.indices = [index for index, answer in enumerate(prompts.answers) if answer is not None]

    def __len__(self) -> int:
        return len(self.indices)

    def order(self, epoch: int) -> list[int]:
        """All of them, in the order of a pass over them."""
        at = {"seed": self._seed, "epoch": FIRST_EPOCH + epoch, "shuffle": self._shuffle}
        return [self.indices[place] for place in epoch_order(len(self), **at)]

    def stream(self, first: int, count: int) -> list[int]:
        """Those from number `first` on of one pass after another."""
        places = range(first, first + count)
        orders = {epoch: self.order(epoch) for epoch in {place // len(self) for place in places}}
        return [orders[place // len(self)][place % len(self)] for place in places]

    def rollouts(self, indices: Sequence[int]) -> Rollouts:
        """Prompts with their answers, one each."""
        answers = [self.prompts.answers[index] for index in indices]
        prompt_ids, prompt_mask = left_pad([self.prompts.token_ids[index] for index in indices], self._pad)
        lengths = torch.tensor([len(answer.token_ids) for answer in answers])
        completion_ids = torch.full((len(answers), int(lengths.max())), self._pad, dtype=torch.int64)
        for row, answer in zip(completion_ids, answers, strict=True):
            row[: len(answer.token_ids)] = torch.tensor(answer.token_ids)
        unknown = torch.full(completion_ids.shape, torch.nan, device=self._device)
        return Rollouts(
            to_device(prompt_ids, self._device),
            prompt_mask,
            to_device(completion_ids, self._device),
            lengths,
            unknown,
            unknown,
            torch.tensor([answer.finished for answer in answers]),
            num_rollouts=1,
        )

    def view(self, indices: Sequence[int]) -> TeacherView | None:
        """What the teachers see of these prompts, where that differs from what the student does."""
        return self._teacher and self._teacher.view(indices)
