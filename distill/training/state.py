"""What a checkpoint keeps of a trainer: everything that the next step depends on, and how it is put back.

Random numbers need no state: every draw is a function of the seed and of what is drawn.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.loss import Rollouts
from distill.training.trainer import Position, Trainer

TEACHER = "teacher"  # what a weight of the teacher that follows is kept as, beside Adam's moments of the student's


class Saved(Protocol):
    """What `state_of` gave, as a checkpoint has it."""

    state: dict[str, Any]
    """With the plain values as `trainer`."""
    shapes: dict[str, torch.Size]
    """Of each weight NAME and of Adam's moments NAME/MOMENT, as they are in one piece."""
    rollouts: dict[str, dict[str, Tensor]]

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Copies the weights and moments that are named into tensors of any placement."""


def state_of(trainer: Trainer, teacher: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Groups of tensors, as this rank has them, and plain values; `teacher` are the weights of one that follows."""
    moments = {
        f"{name}/{key}": value
        for name, parameter in trainer.parameters.items()
        for key, value in trainer.optimizer.state[parameter].items()
    }
    moments |= {f"{name}/{TEACHER}": weight for name, weight in teacher.items()}
    tensors = {"student": dict(trainer.parameters), "optimizer": moments}
    # A batch that is being sampled is waited for: its weights would not be there again.
    for name, rollouts in (("rollouts", trainer.rollouts), ("next_rollouts", trainer.ahead and trainer.ahead.result())):
        if rollouts is not None:
            found = {field.name: getattr(rollouts, field.name) for field in fields(Rollouts)}
            tensors[name] = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    state = {
        "position": vars(trainer.position),
        "total_steps": trainer.total_steps,
        "sampling_seconds": trainer.sampling_seconds,
        "sampled_at": [trainer.sampled_at, trainer.ahead_sampled_at],
        "skipped_steps": trainer.skipped_steps,
        "bad_in_row": trainer.bad_in_row,
        "limits": trainer.limits.state(),
    }
    return tensors, state


def restore(trainer: Trainer, teacher: Mapping[str, Tensor], found: Saved) -> None:
    """Continues from what `state_of` gave, on any number of ranks."""
    state, tensors = found.state["trainer"], dict(trainer.parameters)
    for name, shape in found.shapes.items():
        of, _, moment = name.partition("/")
        if moment == TEACHER:
            tensors[name] = teacher[of]
        elif moment:
            parameter = trainer.parameters[of]
            like = parameter.shape == shape
            tensors[name] = torch.zeros_like(parameter) if like else torch.zeros(shape, device=trainer.device)
            trainer.optimizer.state[parameter][moment] = tensors[name]
    found.read(tensors)
    trainer.position = Position(**state["position"])
    trainer.sampling_seconds = state.get("sampling_seconds") or {"rollout": state["rollout_seconds"]}
    trainer.skipped_steps, trainer.bad_in_row = state.get("skipped_steps", 0), state.get("bad_in_row", 0)
    if "limits" in state:
        trainer.limits.restore(state["limits"])
    begun = trainer.position.step - trainer.position.group
    trainer.sampled_at, trainer.ahead_sampled_at = state.get("sampled_at", (begun, begun))
    for name, group in found.rollouts.items():
        saved = {key: value.to(trainer.device) for key, value in group.items()}
        rollouts = Rollouts(num_rollouts=trainer.options.sampled_rollouts, **saved).planned_on_host()
        if name == "rollouts":
            trainer.rollouts = rollouts
        else:
            trainer.ahead = Future()
            trainer.ahead.set_result(rollouts)
    trainer.weights_changed()
