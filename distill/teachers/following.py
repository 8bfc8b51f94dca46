"""`teacher.update`: a teacher of the student's own weights that follows them, every so many steps or as an average.

Its trained weights are float32 whatever it is computed in, as the student's are: in bfloat16 what a step adds to an
average would round away. All else, such as the frozen weights under adapters, it shares with the student.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models import alias


class FollowingTeacher:
    """A model that begins as the `student` and follows its trained weights."""

    def __init__(self, student: PreTrainedModel, update: str) -> None:
        """`update` is `every:STEPS` or `ema:DECAY`."""
        kind, _, number = update.partition(":")
        self._every = int(number) if kind == "every" else 1
        self._kept = float(number) if kind == "ema" else 0.0
        self.model, self._student = alias(student), student
        copies: dict[int, nn.Parameter] = {}  # a tied weight is one
        for module in self.model.modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.requires_grad:
                    if id(weight) not in copies:
                        copies[id(weight)] = nn.Parameter(weight.detach().clone(), requires_grad=False)
                    module._parameters[name] = copies[id(weight)]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Its own weights, by the names of the student's; of a model that is shared out over ranks, the shards."""
        own = dict(self.model.named_parameters())
        return {name: own[name].detach() for name, weight in self._student.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Follows the student after optimizer step `step`, counted from 1."""
        if step % self._every:
            return
        students = dict(self._student.named_parameters())
        pairs = [(_local(own), _local(students[name].detach())) for name, own in self.weights.items()]
        torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1 - self._kept)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, which lies alike in both models."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
