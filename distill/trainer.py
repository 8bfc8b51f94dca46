"""The training loop: sample a batch of prompts, then one optimizer step for each group of them.

`Trainer.steps` is a generator, so that whoever runs it decides between two steps what to log, evaluate or save.
Weights, gradients and Adam's moments are float32 whatever precision the passes run in.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.diagnostics import step_metrics
from distill.distributed import Ranks
from distill.group import Group, TeacherView
from distill.loss import GroupGradient, LossOptions, ModelParts, accumulate_gradients, score
from distill.memory import MemoryLimits
from distill.metrics import PhaseClock, peak_memory_bytes
from distill.models import whole
from distill.rollout import RolloutEngine, Rollouts

if TYPE_CHECKING:
    from distill.checkpoint import Checkpoint
    from distill.config import TrainingConfig


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next optimizer step is group `group` of batch `batch` of epoch `epoch`."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    group: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: the metrics line, and the rollouts it learned from with each row's reverse KL."""

    metrics: dict[str, float]
    prompts: list[int]
    rollouts: Rollouts
    row_reverse_kl: list[float]
    sound: bool
    """Whether loss and gradient were finite; if not, weights and optimizer are as they were before."""

    def rollout_records(self, prompts: Sequence[str], completions: Sequence[str]) -> list[dict[str, Any]]:
        """A line of `rollouts.jsonl` for each rollout, given the text of each prompt and of each completion."""
        rollouts = self.rollouts
        return [
            {
                "step": self.metrics["step"],
                "prompt": prompts[row // rollouts.num_rollouts],
                "completion": completion,
                "completion_length": int(rollouts.completion_lengths[row]),
                "finished": bool(rollouts.finished[row]),
                "reverse_kl_exact": self.row_reverse_kl[row],
            }
            for row, completion in enumerate(completions)
        ]


class Trainer:
    """Owns the optimizer, the position in the prompts, and the rollouts in hand.

    `prompt_batches(epoch)` gives the epoch's batches of prompt indices; `encode(indices)` their left-padded ids and
    mask, `teacher_view(indices)` what scores them. `on_phase` hears the name of each phase as it begins.
    """

    def __init__(
        self,
        student: nn.Module,
        student_parts: ModelParts,
        teachers: Sequence[ModelParts],
        engine: RolloutEngine,
        prompt_batches: Callable[[int], Sequence[Sequence[int]]],
        encode: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
        options: "TrainingConfig",
        loss_options: LossOptions,
        *,
        vocab_size: int,
        teacher_view: Callable[[Sequence[int]], TeacherView | None] = lambda indices: None,
        limits: MemoryLimits | None = None,
        async_batches: int = 0,
        ranks: Ranks | None = None,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.student, self.student_parts, self.teachers = student, student_parts, teachers
        self.teacher_view = teacher_view
        self.engine, self.prompt_batches, self.encode = engine, prompt_batches, encode
        self.options, self.loss_options, self.vocab_size = options, loss_options, vocab_size
        self.limits, self.on_phase = limits or MemoryLimits(options.tokens_per_micro_batch), on_phase
        self.ranks = ranks or Ranks()
        self.device = student_parts.head.weight.device
        self.clock = PhaseClock(self.device)
        self.parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(
            self.parameters.values(), lr=options.learning_rate, betas=options.adam_betas, fused=True
        )
        self.position = Position()
        self.skipped_steps, self.bad_in_row = 0, 0
        self._rollouts: Rollouts | None = None
        self._rollout_seconds = 0.0
        # With `async_batches`, the batch after the one in hand; and at which steps the weights were taken that sampled.
        self.async_batches, self._next = async_batches, None  # type: int, Future[Rollouts] | None
        self._sampled_at, self._next_sampled_at = 0, 0
        # Batches have the same sizes in every epoch, so the first one's tell how many steps there are.
        sizes = [len(batch) for batch in prompt_batches(0)]
        steps = options.num_epochs * sum(math.ceil(size / options.prompts_per_step) for size in sizes)
        self.total_steps = min(steps, options.max_steps or steps)

    def steps(self) -> Iterator[StepResult]:
        """Trains from `position` to the end, handing out each optimizer step's result.

        When a result is handed out, `position` already names the next step: saving then loses nothing.
        """
        while self.position.step < self.total_steps:
            at = self.position
            batches = self.prompt_batches(at.epoch)
            prompts = batches[at.batch]
            if self._rollouts is None:
                self._sample(at.epoch, batches, at.batch)
            per_step = self.options.prompts_per_step
            chosen = slice(at.group * per_step, min((at.group + 1) * per_step, len(prompts)))
            rollouts = self._rollouts.select(chosen)
            group = Group.of(rollouts, self.teacher_view(prompts[chosen]))
            metrics, row_reverse_kl = self._step(group, groups_in_batch=math.ceil(len(prompts) / per_step))
            self.position = self._after(at, batches)
            if self.position.batch != at.batch or self.position.epoch != at.epoch:
                self._rollouts = None
            sound = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
            self.bad_in_row = 0 if sound else self.bad_in_row + 1
            self.skipped_steps += not sound
            line = {"step": at.step + 1, "epoch": at.epoch, **metrics, "skipped_steps": self.skipped_steps}
            line["rollout_staleness"] = at.step - self._sampled_at
            yield StepResult(line, list(prompts[chosen]), rollouts, row_reverse_kl, sound)

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        peak, warmup = self.options.learning_rate, self.options.warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        remaining = 1 - (step - warmup) / max(1, self.total_steps - warmup)
        shapes = {"constant": 1.0, "linear": remaining, "cosine": 0.5 * (1 - math.cos(math.pi * remaining))}
        return peak * shapes[self.options.lr_schedule]

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that the next step depends on: groups of tensors, as this rank has them, and plain values."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        tensors = {"student": dict(self.parameters), "optimizer": moments}
        # A batch that is being sampled is waited for: its weights would not be there again.
        for name, rollouts in (("rollouts", self._rollouts), ("next_rollouts", self._next and self._next.result())):
            if rollouts is not None:
                found = {field.name: getattr(rollouts, field.name) for field in fields(Rollouts)}
                tensors[name] = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        state = {
            "position": vars(self.position),
            "total_steps": self.total_steps,
            "rollout_seconds": self._rollout_seconds,
            "sampled_at": [self._sampled_at, self._next_sampled_at],
            "skipped_steps": self.skipped_steps,
            "bad_in_row": self.bad_in_row,
            "limits": self.limits.state(),
        }
        return tensors, state

    def restore(self, found: "Checkpoint") -> None:
        """Continues from a checkpoint of what `state` gave, on any number of ranks."""
        state, tensors = found.state["trainer"], dict(self.parameters)
        for name, shape in found.shapes.items():
            of, _, moment = name.partition("/")
            if moment:
                parameter = self.parameters[of]
                like = parameter.shape == shape
                tensors[name] = torch.zeros_like(parameter) if like else torch.zeros(shape, device=self.device)
                self.optimizer.state[parameter][moment] = tensors[name]
        found.read(tensors)
        self.position = Position(**state["position"])
        self._rollout_seconds = state["rollout_seconds"]
        self.skipped_steps, self.bad_in_row = state.get("skipped_steps", 0), state.get("bad_in_row", 0)
        if "limits" in state:
            self.limits.restore(state["limits"])
        begun = self.position.step - self.position.group
        self._sampled_at, self._next_sampled_at = state.get("sampled_at", (begun, begun))
        for name, group in found.rollouts.items():
            saved = {key: value.to(self.device) for key, value in group.items()}
            rollouts = _lengths_on_host(Rollouts(num_rollouts=self.options.num_rollouts_per_prompt, **saved))
            if name == "rollouts":
                self._rollouts = rollouts
            else:
                self._next = Future()
                self._next.set_result(rollouts)
        self.engine.refresh()

    def _after(self, at: Position, batches: Sequence[Sequence[int]]) -> Position:
        step, group = at.step + 1, at.group + 1
        if group * self.options.prompts_per_step < len(batches[at.batch]):
            return replace(at, step=step, group=group)
        if at.batch + 1 < len(batches):
            return Position(step, at.epoch, at.batch + 1)
        return Position(step, at.epoch + 1)

    def _sample(self, epoch: int, batches: Sequence[Sequence[int]], batch: int) -> None:
        self.on_phase("rollout")
        step = self.position.step
        with self.clock.phase("rollout"):
            if self._next is None:
                rollouts = self.ranks.generate(self.engine, **self._request(epoch, batch))
                self._sampled_at = step
            else:
                rollouts, self._sampled_at = self._next.result(), self._next_sampled_at
            self._next = None
            following = step + math.ceil(len(batches[batch]) / self.options.prompts_per_step)
            if self.async_batches and following < self.total_steps:
                place = (epoch, batch + 1) if batch + 1 < len(batches) else (epoch + 1, 0)
                self._next, self._next_sampled_at = self.engine.begin(**self._request(*place)), step
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._rollouts = _lengths_on_host(rollouts)
        self._rollout_seconds = self.clock.read()["rollout"]

    def _request(self, epoch: int, batch: int) -> dict[str, Any]:
        """What the engine is asked for a batch."""
        batches = self.prompt_batches(epoch)
        prompt_ids, prompt_mask = (tensor.to(self.device) for tensor in self.encode(batches[batch]))
        # A prompt's draw is numbered over the whole run, so that no two draws share random numbers.
        first = epoch * sum(map(len, batches)) + sum(map(len, batches[:batch]))
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "num_rollouts": self.options.num_rollouts_per_prompt,
            "prompt_keys": torch.arange(first, first + len(batches[batch])),
        }

    def _step(self, group: Group, groups_in_batch: int) -> tuple[dict[str, float], list[float]]:
        """Scores a group, updates the student, and returns the metrics and each row's mean token reverse KL."""
        self.on_phase("score")
        own = self.ranks.own_rows(group)
        with self.clock.phase("score"):
            teacher_hidden = self.ranks.in_micro_batches(
                self.limits, "score", group.for_teachers, own, lambda parts: score(self.teachers, group, parts)
            )
        self.on_phase("update")
        learning_rate = self.learning_rate(self.position.step)
        with self.clock.phase("update"):
            result = self.ranks.in_micro_batches(
                self.limits, "update", group, own, lambda parts: self._gradients(teacher_hidden, group, parts, own)
            )
            result = self._of_all_ranks(result, group, own)
            grad_norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm))
            # Where this is 1, Adam's fused step leaves everything as it was, without the host having to look.
            self.optimizer.found_inf = 1 - (result.loss.isfinite() & grad_norm.isfinite()).float()
            for settings in self.optimizer.param_groups:
                settings["lr"] = learning_rate
            self.optimizer.step()
            self.engine.refresh()
        metrics, row_reverse_kl = step_metrics(result, group, grad_norm, self.loss_options)
        # A batch's rollouts are shared evenly by the steps that it serves.
        seconds = {"rollout": self._rollout_seconds / groups_in_batch, **self.clock.read()}
        tokens = int(group.completion_lengths.sum())
        metrics |= {
            "learning_rate": learning_rate,
            "completion_tokens": tokens,
            "completion_length": tokens / len(group.completion_lengths),
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "tokens_per_second": tokens / sum(seconds.values()),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        return metrics, row_reverse_kl

    def _of_all_ranks(self, result: GroupGradient, group: Group, own: Tensor) -> GroupGradient:
        """What all ranks found, on every rank; the sum of their gradients is then in the parameters."""
        if self.ranks.size == 1:
            return result
        self.ranks.add_gradients(self.parameters.values())
        total, shifts = self.ranks.total, result.row_gradients
        if shifts is None:
            shifts = result.loss.new_zeros(len(own), self.student_parts.head.weight.shape[1])
        tokens = own.repeat_interleave(group.completion_lengths)
        return GroupGradient(
            total(result.loss),
            result.stats._make(total(torch.stack(list(result.stats)), tokens)),
            total(shifts, own[:, None]),
            total(result.agreement),
        )

    def _gradients(
        self, teacher_hidden: Sequence[Tensor | None], group: Group, parts: list[Tensor], own: Tensor | None = None
    ) -> GroupGradient:
        # Before every attempt: what a failed one added must not count twice.
        self.optimizer.zero_grad(set_to_none=True)
        return accumulate_gradients(
            self.student_parts,
            self.teachers,
            teacher_hidden,
            group,
            parts,
            self.loss_options,
            vocab_size=self.vocab_size,
            checkpointing=self.options.activation_checkpointing,
            own=own,
        )


def _lengths_on_host(rollouts: Rollouts) -> Rollouts:
    """With masks and lengths where the steps' plans are made, so that no step waits for an accelerator to tell them."""
    return replace(
        rollouts,
        prompt_mask=rollouts.prompt_mask.cpu(),
        completion_lengths=rollouts.completion_lengths.cpu(),
        finished=rollouts.finished.cpu(),
    )
