"""What happens between two steps: evaluations, the logs' lines, what is said of a bad step, and checkpoints.

It also knows what a run has come to so far, which is part of every checkpoint.
"""

import time
from collections.abc import Sequence
from typing import Any

from distill.report import MAIN_SET, figure_in_words, shown_figures
from distill.run.checkpoint import Checkpoint
from distill.run.display import Display
from distill.run.early_stopping import Target, best_step, had_enough
from distill.run.health import GradientWatch, LengthWatch, StoppedError, suspects
from distill.run.held_out import Look, look_at
from distill.run.judges import Judges
from distill.run.outcome import NUM_SAMPLES
from distill.run.output import OutputFolder
from distill.run.parts import RunParts
from distill.run.trackers import Trackers
from distill.runtime import read_json_lines
from distill.training import WARM_START, StepResult, decode_samples, restore, state_of, token_view


class Progress:
    """A run between two of its steps; `display` and `trackers` are there once it has begun."""

    display: Display
    trackers: Trackers

    def __init__(
        self,
        parts: RunParts,
        judges: Judges,
        target: Target,
        output: OutputFolder,
        start: Checkpoint | None,
        began: tuple[float, float],
    ) -> None:
        """`target` is what evaluations are compared by; `began` is when the run did, by the clock and in this process's
        own time."""
        self.parts, self.judges, self.target, self.output = parts, judges, target, output
        self._wall_began, self._cpu_began = began
        self.evaluations: list[dict[str, Any]] = []
        self.samples: dict[str, list[str]] = {}
        if start:
            self._continue_from(start)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.parts.trainer.position.done

    @property
    def in_phase(self) -> int:
        """Steps that are done of the phase at hand: of the warm start, or since its end."""
        at = self.parts.trainer.position
        return at.step if at.warm == self.parts.warm_steps else at.warm

    @property
    def warm_start_ends(self) -> bool:
        """Whether the last step was the warm start's last one."""
        return 0 < self.step == self.parts.warm_steps

    @property
    def seconds(self) -> dict[str, float]:
        """What the run has taken so far, its parts before an interruption included."""
        wall, cpu = time.monotonic() - self._wall_began, time.process_time() - self._cpu_began
        return {"wall_seconds": wall, "cpu_seconds": cpu}

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation so far; the untrained student does not count."""
        return best_step(self.evaluations, self.target, since=self.parts.warm_steps)

    @property
    def enough(self) -> str | None:
        """Why the run ends here, before its last step; None where it goes on."""
        settings = self.parts.config.training.early_stopping
        limits = settings and {"patience": settings.patience, "min_delta": settings.min_delta}
        since = [each for each in self.evaluations if each["step"] >= self.parts.warm_steps]
        return had_enough(since, self.target, **limits) if limits else None

    def begin(self, display: Display, trackers: Trackers) -> None:
        """The output folder is open from now on."""
        self.display, self.trackers = display, trackers
        paths = (self.output.path / f"{name}.jsonl" for name in ("metrics", "events"))
        metrics, events = ([] if self.parts.ranks.rank else read_json_lines(path) for path in paths)
        phase = metrics[-1].get("phase") if metrics else None
        of_phase = [line for line in metrics if line.get("phase") == phase]
        self._phase, self._gradients = phase, GradientWatch(line["grad_norm"] for line in of_phase)
        metrics = [line for line in metrics if line.get("phase") != WARM_START]
        said = any(event["event"] == "truncated" for event in events)
        self._lengths = LengthWatch(self.parts.config.rollout, metrics, said=said)

    def evaluate(self) -> None:
        """A held-out evaluation of the student as it is, where there are held-out prompts."""
        parts = self.parts
        if parts.held_out is None:
            return
        self.display.phase("evaluation")
        first, step = self.evaluations[0] if self.evaluations else None, self.step
        main = look_at(parts, self.judges, MAIN_SET, first)
        record, looks = {"step": step, **main.record}, {MAIN_SET: main}
        for name in parts.sets:
            looks[name] = look_at(parts, self.judges, name, first and first.get("sets", {}).get(name))
            record.setdefault("sets", {})[name] = looks[name].record
        self.evaluations.append(record)
        self.output.log("evaluations", [record])
        self.trackers.log_evaluation(record)
        self._keep_samples(main)
        for failure in (line for look in looks.values() for line in look.failures):
            self.notice("metric", step, failure)
        for name, look in looks.items():
            self._tell(name, look.record)

    def _keep_samples(self, look: Look) -> None:
        """The first completion of the first prompts, as text and token by token."""
        parts, step, rollouts = self.parts, self.step, look.evaluation.rollouts
        rows = range(0, len(rollouts.finished), rollouts.num_rollouts)[:NUM_SAMPLES]
        self.samples["after" if step else "before"] = decode_samples(parts.tokenizer, rollouts, rows)
        models, prompts = (parts.student_parts, parts.first_teachers), parts.held_out.student.texts[:NUM_SAMPLES]
        view = token_view(parts.tokenizer, *models, look.evaluation.group, prompts, parts.vocab_size)
        self.output.log("tokens", [{"step": step, "samples": view}])

    def _tell(self, name: str, record: dict[str, Any]) -> None:
        """A line about a set's reverse KL, and one about each of its metrics."""
        step, where = self.step, "" if name == MAIN_SET else f"{name}: "
        figure = f"{record['reverse_kl']:.3f} ± {record['standard_error']:.3f} nats/token"
        change, error = record["reverse_kl_change"], record["reverse_kl_change_standard_error"]
        changed = f", changed by {change:+.3f} ± {error:.3f}" if step and error is not None else ""
        self.display.message(f"{where}held-out reverse KL after step {step}: {figure}{changed}")
        for metric, figures in record.get("metrics", {}).items():
            shown = ", ".join(
                f"{figure} {figure_in_words(figure, figures[figure])}" for figure in shown_figures(figures)
            )
            self.display.message(f"{where}{metric} {shown}")

    def record(self, result: StepResult) -> None:
        """A finished step's lines in the logs."""
        if self.parts.ranks.rank:
            return
        texts = decode_samples(self.parts.tokenizer, result.rollouts, range(len(result.rollouts.finished)))
        warm, rewards = result.metrics.get("phase") == WARM_START, self.parts.rewards
        if rewards and not warm:
            result.metrics.update(rewards.figures(result.rollouts))
        self.output.log("metrics", [result.metrics])
        self.trackers.log(result.metrics)
        if not warm:
            records = _rollout_records(result, self.parts.texts(result), texts)
            if rewards:
                of_rows = rewards.of_rows(result.rollouts)
                records = [{**each, "rewards": of} for each, of in zip(records, of_rows, strict=True)]
            self.output.log("rollouts", records)
        self.display.update(result.metrics, texts[0])

    def inspect(self, result: StepResult) -> None:
        """Reports a skipped step, a jump of the gradient, or completions that are cut by length; too many skipped in a
        row end the run."""
        metrics, step, prompts = result.metrics, result.metrics["step"], self.parts.texts(result)
        if metrics.get("phase") != self._phase:  # whose gradients are of another loss
            self._phase, self._gradients = metrics.get("phase"), GradientWatch()
        median = self._gradients.spike(metrics["grad_norm"])
        if median is not None:
            message = f"gradient norm {metrics['grad_norm']:.3g}, {metrics['grad_norm'] / median:.0f} times the median"
            self.notice("gradient_spike", step, f"step {step}: {message}; prompts: {suspects(prompts)}")
        of_rollouts = self._phase != WARM_START
        if of_rollouts and (complaint := self._lengths.complaint(metrics, last=step == self.parts.total_steps)):
            self.notice("truncated", step, complaint)
        if result.sound:
            return
        figures = f"loss {metrics['loss']:.3g}, gradient norm {metrics['grad_norm']:.3g}"
        rows = zip(result.rollouts.prompt_index.tolist(), result.row_reverse_kl, strict=True)
        named = f"prompts: {suspects(prompts, rows)}"
        self.notice("skipped", step, f"step {step} skipped: {figures}; {named}")
        in_row, allowed = self.parts.trainer.bad_in_row, self.parts.config.training.max_bad_steps
        if in_row > allowed:
            self.save()
            raise StoppedError.after(in_row, allowed, step - in_row, self.output.checkpoints, f"{figures}; {named}")

    def notice(self, event: str, step: int, message: str) -> None:
        """Says what happened, and keeps it among the events."""
        self.display.message(message)
        self.output.log("events", [{"step": step, "event": event, "message": message}])

    def save(self) -> None:
        """Writes a checkpoint, from which the same command continues."""
        self.display.phase("checkpoint")
        parts = self.parts
        tensors, state = state_of(parts.trainer, parts.teacher_weights)
        state = {
            "trainer": state,
            "config": parts.config.model_dump(mode="json"),
            **parts.prompts.identity.state(),
            # `auto` was decided by a measurement, which another day could decide otherwise.
            "rollout_precision": parts.engine.precision,
            "layer_choice": parts.layer_choice,
            "reward_files": parts.reward_files,
            **({"answers": parts.answers_digest} if parts.answers else {}),
            "evaluations": self.evaluations,
            "samples": self.samples,
            "environment": parts.environment(),
            **self.seconds,
        }
        keep_last = parts.config.training.keep_last
        self.output.save(self.step, tensors, state, keep_last=keep_last, best=self.best_step, ranks=parts.ranks)

    def _continue_from(self, start: Checkpoint) -> None:
        parts, state = self.parts, start.state
        restore(parts.trainer, parts.teacher_weights, start)
        self.evaluations, self.samples = state["evaluations"], state["samples"]
        self._wall_began -= state["wall_seconds"]
        self._cpu_began -= state.get("cpu_seconds", 0.0)
        now = parts.environment()
        for name, before in state.get("environment", {}).items():
            if now[name] != before:
                parts.tell(f"{name} was {before}, now {now[name]}: the numbers' last digits can differ from now on")
        parts.tell(f"continuing after step {start.step} of {parts.total_steps}")


def _rollout_records(result: StepResult, prompts: Sequence[str], completions: Sequence[str]) -> list[dict[str, Any]]:
    """A line of `rollouts.jsonl` for each rollout, given the text of each prompt and of each completion."""
    rollouts = result.rollouts
    return [
        {
            "step": result.metrics["step"],
            "prompt": prompts[prompt],
            "completion": completion,
            "completion_length": int(rollouts.completion_lengths[row]),
            "finished": bool(rollouts.finished[row]),
            "reverse_kl_exact": result.row_reverse_kl[row],
        }
        for row, (prompt, completion) in enumerate(zip(rollouts.prompt_index.tolist(), completions, strict=True))
    ]
