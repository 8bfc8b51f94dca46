"""The training loop: sample a batch of prompts, then one optimizer step for each group of them.

`Trainer.steps` is a generator, so that whoever runs it decides between two steps what to log, evaluate or save.
Weights, gradients and Adam's moments are float32 whatever precision the passes run in. What a checkpoint keeps of a
trainer is in state.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.config import TrainingConfig
from distill.loss import (
    Group,
    GroupGradient,
    LossOptions,
    ModelParts,
    Rollouts,
    TeacherStates,
    accumulate_gradients,
    score,
)
from distill.models import whole
from distill.rollout import RolloutEngine
from distill.runtime import MemoryLimits, PhaseClock, peak_memory_bytes, to_device
from distill.training.diagnostics import Metrics, step_metrics
from distill.training.ranks import Ranks


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next optimizer step is group `group` of batch `batch` of epoch `epoch`; `warm` steps were
    taken before the first rollout."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    group: int = 0
    warm: int = 0

    @property
    def done(self) -> int:
        """All optimizer steps so far, by which metrics, evaluations and checkpoints are numbered."""
        return self.warm + self.step


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: the metrics line, and the rollouts it learned from with each row's reverse KL."""

    metrics: dict[str, float]
    prompts: list[int]
    rollouts: Rollouts
    row_reverse_kl: list[float]
    sound: bool
    """Whether loss and gradient were finite; if not, weights and optimizer are as they were before."""


class Lesson(NamedTuple):
    """How a step learns from its group: whose scores, which loss, what is said of it, who hears of changed weights."""

    teachers: Sequence[ModelParts]
    loss_options: LossOptions
    measure: Callable[[GroupGradient, Group, Tensor, LossOptions], tuple[Metrics, list[float]]] = step_metrics
    after_step: Callable[[int], None] = lambda step: None


class Trainer:
    """Owns the optimizer, the position in the prompts, and the rollouts in hand.

    `prompt_batches(epoch)` gives the epoch's batches of prompt indices; `encode(indices)` their left-padded ids and
    mask; `judge(rollouts, indices)` a batch of rollouts with their rewards, on the host; `make_group(rollouts, indices,
    step)` those that a step learns from, and its group; `measure` says of it what `step_metrics` does. `on_phase` hears
    the name of each phase as it begins, `after_step` the number of each step when the weights have changed.
    """

    def __init__(
        self,
        student: nn.Module,
        student_parts: ModelParts,
        teachers: Sequence[ModelParts],
        engine: RolloutEngine,
        prompt_batches: Callable[[int], Sequence[Sequence[int]]],
        encode: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
        options: TrainingConfig,
        loss_options: LossOptions,
        *,
        vocab_size: int,
        make_group: Callable[[Rollouts, Sequence[int], int], tuple[Rollouts, Group]] = lambda r, *_: (r, Group.of(r)),
        measure: Callable[..., tuple[Metrics, list[float]]] = step_metrics,
        limits: MemoryLimits | None = None,
        async_batches: int = 0,
        ranks: Ranks | None = None,
        judge: Callable[[Rollouts, Sequence[int]], Rollouts] | None = None,
        after_step: Callable[[int], None] = lambda step: None,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.student, self.student_parts, self.make_group = student, student_parts, make_group
        self.lesson = Lesson(teachers, loss_options, measure, after_step)
        self.engine, self.prompt_batches, self.encode = engine, prompt_batches, encode
        self.options, self.vocab_size, self.ranks, self.judge = options, vocab_size, ranks or Ranks(), judge
        self.device, self.width = student_parts.head.weight.device, student_parts.head.weight.shape[1]
        self.limits = limits or MemoryLimits(options.tokens_per_micro_batch, device=self.device)
        self.on_phase = on_phase
        self.clock = PhaseClock(self.device)
        self.parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(
            self.parameters.values(), lr=options.learning_rate, betas=options.adam_betas, fused=True
        )
        self.position = Position()
        self.skipped_steps, self.bad_in_row = 0, 0
        self.rollouts: Rollouts | None = None
        self.sampling_seconds = {"rollout": 0.0}  # of the batch in hand
        # With `async_batches`, the batch after the one in hand; and at which steps the weights were taken that sampled.
        self.async_batches = async_batches
        self.ahead: Future[Rollouts] | None = None
        self.sampled_at, self.ahead_sampled_at = 0, 0
        # Batches have the same sizes in every epoch, so the first one's tell how many steps there are.
        self.total_steps = options.total_steps(map(len, prompt_batches(0)))

    def steps(self) -> Iterator[StepResult]:
        """Trains from `position` to the end, handing out each optimizer step's result.

        When a result is handed out, `position` already names the next step: saving then loses nothing.
        """
        while self.position.step < self.total_steps:
            at = self.position
            batches = self.prompt_batches(at.epoch)
            prompts = batches[at.batch]
            if self.rollouts is None:
                self._sample(at.epoch, batches, at.batch)
            per_step = self.options.prompts_per_step
            chosen = slice(at.group * per_step, min((at.group + 1) * per_step, len(prompts)))
            rollouts, group = self.make_group(self.rollouts.select(chosen), prompts[chosen], at.step)
            learning_rate = self.options.learning_rate_at(at.step, self.total_steps)
            # A batch's rollouts are shared evenly by the steps that it serves.
            seconds = {k: value / math.ceil(len(prompts) / per_step) for k, value in self.sampling_seconds.items()}
            line, row_reverse_kl, sound = self.step(group, self.lesson, learning_rate, seconds)
            self.position = self._after(at, batches)
            if self.position.batch != at.batch or self.position.epoch != at.epoch:
                self.rollouts = None
            line["rollout_staleness"] = at.step - self.sampled_at
            yield StepResult(line, list(prompts[chosen]), rollouts, row_reverse_kl, sound)

    def _after(self, at: Position, batches: Sequence[Sequence[int]]) -> Position:
        step, group = at.step + 1, at.group + 1
        if group * self.options.prompts_per_step < len(batches[at.batch]):
            return replace(at, step=step, group=group)
        last = at.batch + 1 == len(batches)
        return replace(at, step=step, epoch=at.epoch + last, batch=0 if last else at.batch + 1, group=0)

    def _sample(self, epoch: int, batches: Sequence[Sequence[int]], batch: int) -> None:
        self.on_phase("rollout")
        step = self.position.step
        with self.clock.phase("rollout"):
            if self.ahead is None:
                rollouts = self.ranks.generate(self.engine, **self._request(epoch, batch))
                self.sampled_at = step
            else:
                rollouts, self.sampled_at = self.ahead.result(), self.ahead_sampled_at
            self.ahead = None
            following = step + math.ceil(len(batches[batch]) / self.options.prompts_per_step)
            if self.async_batches and following < self.total_steps:
                place = (epoch, batch + 1) if batch + 1 < len(batches) else (epoch + 1, 0)
                self.ahead, self.ahead_sampled_at = self.engine.begin(**self._request(*place)), step
        self.rollouts = rollouts.planned_on_host()
        if self.judge:
            self.on_phase("rewards")
            with self.clock.phase("rewards"):
                self.rollouts = self.judge(self.rollouts, batches[batch])
        self.sampling_seconds = self.clock.read()

    def _request(self, epoch: int, batch: int) -> dict[str, Any]:
        """What the engine is asked for a batch."""
        batches = self.prompt_batches(epoch)
        prompt_ids, prompt_mask = (to_device(tensor, self.device) for tensor in self.encode(batches[batch]))
        # A prompt's draw is numbered over the whole run, so that no two draws share random numbers.
        first = epoch * sum(map(len, batches)) + sum(map(len, batches[:batch]))
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "num_rollouts": self.options.sampled_rollouts,
            "prompt_keys": torch.arange(first, first + len(batches[batch])),
        }

    def step(
        self, group: Group, lesson: Lesson, learning_rate: float, sampling_seconds: Mapping[str, float]
    ) -> tuple[Metrics, list[float], bool]:
        """Scores a group, updates the student, and returns the metrics, each row's mean token reverse KL, and whether
        loss and gradient were finite; the position is the caller's to move."""
        self.on_phase("score")
        own = self.ranks.own_rows(group)
        with self.clock.phase("score"):
            teacher_hidden = self.ranks.in_micro_batches(
                self.limits, "score", group, own, lambda parts: score(lesson.teachers, group, parts), by_teacher=True
            )
        self.on_phase("update")
        with self.clock.phase("update"):
            learn = partial(self._gradients, lesson, teacher_hidden, group, own)
            result = self.ranks.in_micro_batches(self.limits, "update", group, own, learn)
            result = self.ranks.sum_of(result, group, own, self.width, self.parameters.values())
            grad_norm = whole(nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
            # The gradient is clipped as Adam's fused step reads it, which saves a pass over memory.
            self.optimizer.grad_scale = ((grad_norm + 1e-6) / self.options.max_grad_norm).clamp(min=1)
            # Where this is 1, Adam's fused step leaves everything as it was, without the host having to look.
            self.optimizer.found_inf = 1 - (result.loss.isfinite() & grad_norm.isfinite()).float()
            for settings in self.optimizer.param_groups:
                settings["lr"] = learning_rate
            self.optimizer.step()
            self.weights_changed()
            lesson.after_step(self.position.step + 1)
        metrics, row_reverse_kl = lesson.measure(result, group, grad_norm, lesson.loss_options)
        seconds = {**sampling_seconds, **self.clock.read()}
        sound = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        self.bad_in_row = 0 if sound else self.bad_in_row + 1
        self.skipped_steps += not sound
        line = {
            "step": self.position.done + 1,
            "epoch": self.position.epoch,
            **metrics,
            "learning_rate": learning_rate,
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "tokens_per_second": metrics["completion_tokens"] / sum(seconds.values()),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "skipped_steps": self.skipped_steps,
        }
        return line, row_reverse_kl, sound

    def weights_changed(self) -> None:
        """Has everything that computes with copies of the student's weights take them anew."""
        self.student_parts.refresh()
        self.engine.refresh()

    def _gradients(
        self, lesson: Lesson, teacher_hidden: TeacherStates, group: Group, own: Tensor, parts: list[Tensor]
    ) -> GroupGradient:
        # Before every attempt: what a failed one added must not count twice.
        self.optimizer.zero_grad(set_to_none=True)
        return accumulate_gradients(
            self.student_parts,
            lesson.teachers,
            teacher_hidden,
            group,
            parts,
            lesson.loss_options,
            vocab_size=self.vocab_size,
            checkpointing=self.options.activation_checkpointing,
            own=own,
        )
