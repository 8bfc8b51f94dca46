"""What stands in a teacher's place where written answers are all that there is to learn from: it says nothing."""

import torch
from torch import Tensor

from distill.loss import ModelParts


class NoTeacher(ModelParts):
    """The loss to it is the tokens' cross entropy."""

    silent = True
    width = 1

    def hidden(self, *rollouts: Tensor) -> Tensor:
        """[K, 1] float32, unknown, of every token of the rows, which are those of `completion_hidden`."""
        _, _, completion_ids, lengths, _ = rollouts
        return torch.full((int(lengths.sum()), self.width), torch.nan, device=completion_ids.device)


NO_TEACHER = NoTeacher(None, None, torch.float32)
