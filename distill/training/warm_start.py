"""The warm start: optimizer steps on written answers before the first rollout.

Its steps are those of the trainer, with another group, another loss and a learning rate of their own. The optimizer
begins anew after the last of them, so that what follows is what a run of the model would do that was saved here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.config import WarmStartConfig
from distill.loss import Group, GroupGradient, LossOptions, ModelParts
from distill.training.answers import Answers
from distill.training.diagnostics import Metrics, step_metrics
from distill.training.trainer import Lesson, StepResult, Trainer

WARM_START = "warm_start"  # `phase` of these steps' metrics


class WarmStart:
    """The steps of `trainer` before its first rollout."""

    def __init__(
        self, trainer: Trainer, answers: Answers, settings: WarmStartConfig, teachers: Sequence[ModelParts]
    ) -> None:
        """`teachers` score the answers, or say nothing where their cross entropy is all."""
        self.trainer, self.answers, self.settings = trainer, answers, settings
        options = trainer.options
        asked = settings.answers_per_step or options.prompts_per_step * options.num_rollouts_per_prompt
        self.per_step = min(asked, len(answers))
        self.total_steps = settings.total_steps(len(answers), self.per_step)
        loss = replace(trainer.lesson.loss_options, objective="forward_kl", of_written="forward_kl")
        self._lesson = Lesson(teachers, loss, answer_metrics)

    def steps(self) -> Iterator[StepResult]:
        """Trains to the end of the warm start, handing out each step's result as `Trainer.steps` does."""
        trainer, options = self.trainer, self.trainer.options
        in_epoch = math.ceil(len(self.answers) / self.per_step)
        while (at := trainer.position).warm < self.total_steps:
            epoch, first = at.warm // in_epoch, at.warm % in_epoch * self.per_step
            indices = self.answers.order(epoch)[first : first + self.per_step]
            rollouts = self.answers.rollouts(indices)
            group = Group.of(rollouts, self.answers.view(indices) if self._scored else None)
            group = group._replace(written=torch.ones_like(rollouts.finished))
            rate = options.learning_rate_at(at.warm, self.total_steps, self.settings.learning_rate)
            line, row_reverse_kl, sound = trainer.step(group, self._lesson, rate, {"rollout": 0.0})
            trainer.position = replace(at, warm=at.warm + 1)
            if trainer.position.warm == self.total_steps:
                trainer.optimizer.state.clear()
            yield StepResult(line | {"epoch": epoch}, indices, rollouts, row_reverse_kl, sound)

    @property
    def _scored(self) -> bool:
        return not any(teacher.silent for teacher in self._lesson.teachers)


def answer_metrics(
    result: GroupGradient, group: Group, grad_norm: Tensor, options: LossOptions
) -> tuple[Metrics, list[float]]:
    """As `step_metrics`, of answers: with their cross entropy, and without a sampled estimate of a divergence."""
    metrics, row_reverse_kl = step_metrics(result, group, grad_norm, options)
    cross_entropy = -result.stats.student_logprob.mean().item()
    return {"phase": WARM_START, **metrics, "reverse_kl": math.nan, "cross_entropy": cross_entropy}, row_reverse_kl
