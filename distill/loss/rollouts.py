"""The record of what was sampled: N completions of each of B prompts, as every engine makes them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """R = B·N completions, prompt-major: row r continues prompt r // N. Log-probabilities in nats."""

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool, true where there is a token
    completion_ids: Tensor  # [R, T] int64, right-padded
    completion_lengths: Tensor  # [R] int64; the sampled end-of-sequence token counts, nothing after it does
    logprob: Tensor  # [R, T] float32: of the plain softmax of the student at sampling; 0 in the padding
    sampling_logprob: Tensor  # [R, T] float32: of the distribution that was sampled from; 0 in the padding
    finished: Tensor  # [R] bool: ended by an end-of-sequence token, not cut by length
    num_rollouts: int  # N
    rewards: Tensor | None = None  # [R, F] float64 on the host: of each of F tasks; NaN where it has none
    task_advantage: Tensor | None = None  # [R] float32 on the host, nats: what they are worth beside the others'
    rows: Tensor | None = None  # [R] int64 on the host: which of B·N they are, where some are left out

    @property
    def prompt_index(self) -> Tensor:
        """[R] int64 on the host: the prompt that each row continues."""
        rows = torch.arange(len(self.completion_lengths)) if self.rows is None else self.rows
        return rows // self.num_rollouts

    def select(self, prompts: slice) -> "Rollouts":
        """The rollouts of some prompts, without the columns that are padding in all of them."""
        start, stop, step = prompts.indices(self.prompt_ids.shape[0])
        if step != 1 or stop <= start:
            raise ValueError(f"select needs a non-empty range of prompts, got {prompts}")
        rows = slice(start * self.num_rollouts, stop * self.num_rollouts)
        mask = self.prompt_mask[start:stop]
        first = int(mask.any(0).int().argmax())
        length = int(self.completion_lengths[rows].max())
        return Rollouts(
            self.prompt_ids[start:stop, first:],
            mask[:, first:],
            self.completion_ids[rows, :length],
            self.completion_lengths[rows],
            self.logprob[rows, :length],
            self.sampling_logprob[rows, :length],
            self.finished[rows],
            self.num_rollouts,
            *(None if of_row is None else of_row[rows] for of_row in (self.rewards, self.task_advantage)),
        )

    def planned_on_host(self) -> "Rollouts":
        """With masks, lengths and rewards where the steps' plans are made, so that no step waits for an accelerator."""
        names = ("prompt_mask", "completion_lengths", "finished", "rewards", "task_advantage")
        planned = {name: getattr(self, name) for name in names}
        return replace(self, **{name: values.cpu() for name, values in planned.items() if values is not None})
