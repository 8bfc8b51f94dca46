"""One run, from models and prompts to a trained model: loading, the loop's surroundings, and every output file.

The trainer takes the steps; here stands what happens between two of them: logging, evaluation, checkpoints.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import Signals
from typing import Any

from rich.console import Console

from distill import checkpoint
from distill.card import write_card
from distill.config import Config, to_yaml
from distill.display import Display
from distill.distributed import Ranks
from distill.evaluate import check_against_itself, decode_samples, evaluate
from distill.generation_copy import choose_dtype as choose_rollout_dtype
from distill.health import GradientWatch, StoppedError, suspects
from distill.layer_choice import choose_layers
from distill.loading import (
    Pair,
    choose_device,
    choose_dtype,
    evaluation_arguments,
    load_pair,
    load_prompt_sets,
    make_engine,
    make_student,
)
from distill.lora import describe, merged, save_adapter
from distill.loss import LossOptions, ModelParts
from distill.memory import MemoryLimitError, MemoryLimits
from distill.metrics import read_json_lines
from distill.models import split_head
from distill.output import NoOutput, OutputError, OutputFolder
from distill.prompts import epoch_batches, epoch_order, left_pad
from distill.report import LiveReport
from distill.server import ServerError
from distill.summary import NUM_SAMPLES, environment, show_summary, summarise
from distill.token_view import token_view
from distill.trackers import Trackers, check_installed
from distill.trainer import StepResult, Trainer


class Run:
    """A run's models, files and progress; `execute` does it all."""

    def __init__(
        self,
        config: Config,
        console: Console,
        received_signal: Callable[[], Signals | None],
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.console, self.ranks = config, console, ranks or Ranks()
        self.received_signal = lambda: self.ranks.signal(received_signal())
        self.started, self.cpu_started = time.monotonic(), time.process_time()
        self.device = choose_device(config.training.device, self.ranks)
        self.dtype = choose_dtype(config.training.precision, self.device)
        self.evaluations: list[dict[str, Any]] = []
        self.samples: dict[str, list[str]] = {}
        check_installed(config.training.report_to)
        self.layer_choice: dict[str, Any] | None = None
        # First of all: a folder that is in use or cannot be written should not cost the loading of two models.
        kind = NoOutput if self.ranks.rank else OutputFolder
        self.output = self.ranks.together(lambda: kind(config.training.output_dir), (OutputError,))
        self.folder, self.report = self.output.path, LiveReport(self.output)
        try:
            self.start = self._find_checkpoint()
            self._load()
            if self.start:
                checkpoint.accept(self.start, self.config, self.prompts.digest, self.student)
            precision = self.start.state["rollout_precision"] if self.start else config.rollout.precision
            # Each rank would measure for itself; a server's is its own.
            if self.ranks.size > 1 and precision == "auto" and not config.rollout.server:
                precision = self.ranks.of_first(str(choose_rollout_dtype(self.student, precision))[len("torch.") :])
            self.trainer = self._make_trainer(precision)
            if self.start:
                self._restore(self.start)
        except BaseException:
            self.output.release()
            raise

    def execute(self) -> int:
        """Trains, evaluates and writes everything; returns the exit status."""
        display = Display(self.trainer.total_steps, self.trainer.position.step, self.console)
        self.trainer.on_phase = display.phase
        self.limits.report = lambda message: self._notice("memory", self.trainer.position.step + 1, message, display)
        for server in self.servers:
            server.report = lambda message: self._notice("server", self.trainer.position.step + 1, message, display)
        try:
            self.ranks.meet()  # all have read what may be set aside
            self._open_folder()
            self.trackers = Trackers(
                () if self.ranks.rank else self.config.training.report_to,
                self.folder,
                self.config.model_dump(mode="json"),
                self.start is not None,
                lambda message: self._notice("tracker", self.trainer.position.step, message, display),
            )
            with self.trackers, display:
                try:
                    stop = self._train(display)
                except (MemoryLimitError, ServerError) as error:
                    if self.ranks.sharded and isinstance(error, MemoryLimitError):  # the others do not know of it
                        raise
                    # Nothing of the step at hand has been applied.
                    self.trainer.optimizer.zero_grad(set_to_none=True)
                    self._save(display)
                    step = self.trainer.position.step
                    raise type(error)(f"{error}. Saved after step {step}") from None
                if stop:
                    return 128 + stop
                display.phase("writing the model")
                self.student = self.ranks.gathered_model(self.student)
                if self.config.student.lora:
                    self.output.replace("adapter", self._write_adapter)
                self.output.replace("final", self._write_model)
                self.trackers.complete = True
            if self.ranks.rank:
                return 0
            summary = summarise(self)
            self.output.write_text("summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
            self.report.finish()
            show_summary(self.console, summary, self.folder)
        finally:
            self.output.release()
        return 0

    def _train(self, display: Display) -> Signals | None:
        """Takes every step that is left; returns the signal that ended it early, with everything saved."""
        trainer, training = self.trainer, self.config.training
        if not self.evaluations:
            self._evaluate(display)
        if trainer.position.step == trainer.total_steps:
            return None
        if stop := self.received_signal():  # while the models were loaded
            return self._stopped(stop, display)
        for result in trainer.steps():
            self._record(result, display)
            self._inspect(result, display)
            step, last = trainer.position.step, trainer.position.step == trainer.total_steps
            best_before = self.best_step
            if evaluated := last or (training.eval_every and step % training.eval_every == 0):
                self._evaluate(display)
            stop = self.received_signal()
            if stop and not last:
                return self._stopped(stop, display)
            if saved := last or step % training.save_every == 0 or self.best_step != best_before:
                self._save(display)
            if (evaluated or saved) and not last:
                self.report.write()
        return None

    def _stopped(self, stop: Signals, display: Display) -> Signals:
        self._save(display)
        self.report.finish()
        saved = f"{stop.name}: saved after step {self.trainer.position.step}"
        display.message(f"{saved}; the same command continues from there")
        return stop

    @property
    def best_step(self) -> int | None:
        """The step after which the held-out reverse KL was lowest so far; the untrained student does not count."""
        trained = [e for e in self.evaluations if e["step"] and math.isfinite(e["reverse_kl"])]
        return min(trained, key=lambda e: e["reverse_kl"])["step"] if trained else None

    def _load(self) -> None:
        pair = load_pair(self.config, self.device, self.dtype)
        self.tokenizer, self.vocab_size = pair.tokenizer, pair.vocab_size
        self.teachers = [teacher.parts for teacher in pair.teachers]
        self.servers = [teacher.body.server for teacher in self.teachers if teacher.sampled_only]
        train, held_out = load_prompt_sets(self.config, pair, self._tell)
        self.prompts, self.teacher_prompts = train
        self.held_out, self.eval_prompts = held_out, held_out and held_out.student
        for teacher in self.teachers:
            check_against_itself(teacher, self.prompts.token_ids[0], self.vocab_size)
        self.dropped_layers = self._choose_layers(pair)
        self.student = make_student(pair.student, self.config, self.dropped_layers)
        self.student_parts = self.ranks.shard(self.student, ModelParts(*split_head(self.student), self.dtype))
        self.teachers = [self.ranks.shard(teacher.model, teacher.parts) for teacher in pair.teachers]
        if self.config.student.lora:
            self._tell(describe(self.student))

    def _tell(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _choose_layers(self, pair: Pair) -> Sequence[int]:
        """The layers to drop: as configured, as the checkpoint's run found them, or found now."""
        if not isinstance(wanted := self.config.student.drop_layers, str):
            return wanted
        if self.start:  # of a run with another configuration, which is refused when all is loaded
            self.layer_choice = self.start.state.get("layer_choice") or {"dropped": ()}
        else:
            self.layer_choice = choose_layers(self.config, pair, self.held_out, self.dtype, self.console)
            self.layer_choice = self.ranks.of_first(self.layer_choice)
        return self.layer_choice["dropped"]

    def _make_trainer(self, rollout_precision: str) -> Trainer:
        config, training = self.config, self.config.training
        self.limits = MemoryLimits(training.tokens_per_micro_batch, fixed=self.ranks.sharded)
        self.engine = make_engine(
            self.student, config, self.tokenizer, self.vocab_size, rollout_precision, self.limits, self.ranks
        )
        if config.rollout.server and self.ranks.rank == 0:
            self.servers.append(self.engine.server)

        order = {"count": len(self.prompts), "seed": training.seed, "shuffle": config.prompts.shuffle}
        return Trainer(
            self.student,
            self.student_parts,
            self.teachers,
            self.engine,
            lambda epoch: epoch_batches(epoch_order(epoch=epoch, **order), config.prompts_per_batch),
            lambda indices: left_pad([self.prompts.token_ids[i] for i in indices], self.tokenizer.pad_token_id),
            training,
            LossOptions(**config.loss.model_dump(), mask_truncated=config.rollout.mask_truncated),
            vocab_size=self.vocab_size,
            teacher_view=lambda indices: self.teacher_prompts and self.teacher_prompts.view(indices),
            limits=self.limits,
            async_batches=config.rollout.async_batches,
            ranks=self.ranks,
        )

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to continue from, which rank 0 decides."""
        ranks, where = self.ranks, (self.config.training.resume, self.output.checkpoints)
        found = ranks.together(lambda: None if ranks.rank else checkpoint.find(*where), (checkpoint.CheckpointError,))
        path = ranks.of_first(found and str(found.path))
        return checkpoint.load(Path(path), verify=False) if path and ranks.rank else found

    def _restore(self, start: checkpoint.Checkpoint) -> None:
        self.trainer.restore(start)
        self.evaluations, self.samples = start.state["evaluations"], start.state["samples"]
        self.started -= start.state["wall_seconds"]
        self.cpu_started -= start.state.get("cpu_seconds", 0.0)
        now = environment(self)
        for name, before in start.state.get("environment", {}).items():
            if now[name] != before:
                self._tell(f"{name} was {before}, now {now[name]}: the numbers' last digits can differ from now on")
        self._tell(f"continuing after step {start.step} of {self.trainer.total_steps}")

    def _open_folder(self) -> None:
        """Sets an earlier run's folder aside where this one starts over, and opens the files that grow."""
        began, finished = (self.folder / name for name in ("metrics.jsonl", "final"))
        # A finished run is never written over, even when its checkpoints were removed to make room.
        over = began.exists() if self.config.training.resume == "never" else finished.exists()
        if self.start is None and over:
            kept = self.output.set_aside()
            self._tell(f"the earlier run's folder is now {kept}")
        if self.start:
            with self.output.writing("the damaged checkpoints' new names"):
                checkpoint.set_aside_newer(self.output.checkpoints, self.start.step)
        self.output.open_logs(self.start)
        self.output.write_text("config.yaml", to_yaml(self.config))
        if self.layer_choice:
            self.output.write_text("layers.json", json.dumps(self.layer_choice, indent=1))
        metrics = [] if self.ranks.rank else read_json_lines(self.folder / "metrics.jsonl")
        self.gradients = GradientWatch(line["grad_norm"] for line in metrics)

    def _evaluate(self, display: Display) -> None:
        if self.eval_prompts is None:
            return
        display.phase("evaluation")
        step, count = self.trainer.position.step, self.config.evaluation.num_rollouts_per_prompt
        result = evaluate(
            self.engine,
            self.student_parts,
            self.teachers,
            vocab_size=self.vocab_size,
            limits=self.limits,
            ranks=self.ranks,
            **evaluation_arguments(self.config, self.held_out, self.tokenizer.pad_token_id),
        )
        record = {"step": step, **result.record()}
        self.evaluations.append(record)
        self.output.log("evaluations", [record])
        self.trackers.log_evaluation(record)
        rows = range(0, len(result.rollouts.finished), count)[:NUM_SAMPLES]
        self.samples["after" if step else "before"] = decode_samples(self.tokenizer, result.rollouts, rows)
        models, prompts = (self.student_parts, self.teachers), self.eval_prompts.texts[:NUM_SAMPLES]
        view = token_view(self.tokenizer, *models, result.group, prompts, self.vocab_size)
        self.output.log("tokens", [{"step": step, "samples": view}])
        display.message(
            f"held-out reverse KL after step {step}: {result.reverse_kl:.3f} ± {result.standard_error:.3f} nats/token"
        )

    def _record(self, result: StepResult, display: Display) -> None:
        if self.ranks.rank:
            return
        texts = decode_samples(self.tokenizer, result.rollouts, range(len(result.rollouts.finished)))
        self.output.log("metrics", [result.metrics])
        self.trackers.log(result.metrics)
        prompts = [self.prompts.texts[index] for index in result.prompts]
        self.output.log("rollouts", result.rollout_records(prompts, texts))
        display.update(result.metrics, texts[0])

    def _inspect(self, result: StepResult, display: Display) -> None:
        """Reports a skipped step or a jump of the gradient; too many skipped in a row end the run."""
        metrics, step = result.metrics, result.metrics["step"]
        prompts = [self.prompts.texts[index] for index in result.prompts]
        median = self.gradients.spike(metrics["grad_norm"])
        if median is not None:
            message = f"gradient norm {metrics['grad_norm']:.3g}, {metrics['grad_norm'] / median:.0f} times the median"
            self._notice("gradient_spike", step, f"step {step}: {message}; prompts: {suspects(prompts)}", display)
        if result.sound:
            return
        figures = f"loss {metrics['loss']:.3g}, gradient norm {metrics['grad_norm']:.3g}"
        named = f"prompts: {suspects(prompts, result.row_reverse_kl)}"
        self._notice("skipped", step, f"step {step} skipped: {figures}; {named}", display)
        in_row, allowed = self.trainer.bad_in_row, self.config.training.max_bad_steps
        if in_row > allowed:
            self._save(display)
            raise StoppedError.after(in_row, allowed, step - in_row, self.output.checkpoints, f"{figures}; {named}")

    def _notice(self, event: str, step: int, message: str, display: Display) -> None:
        display.message(message)
        self.output.log("events", [{"step": step, "event": event, "message": message}])

    def _save(self, display: Display) -> None:
        display.phase("checkpoint")
        tensors, state = self.trainer.state()
        state = {
            "trainer": state,
            "config": self.config.model_dump(mode="json"),
            "prompts": self.prompts.digest,
            # `auto` was decided by a measurement, which another day could decide otherwise.
            "rollout_precision": self.engine.precision,
            "layer_choice": self.layer_choice,
            "evaluations": self.evaluations,
            "samples": self.samples,
            "environment": environment(self),
            "wall_seconds": time.monotonic() - self.started,
            "cpu_seconds": time.process_time() - self.cpu_started,
        }
        step, keep_last = self.trainer.position.step, self.config.training.keep_last
        self.output.save(step, tensors, state, keep_last=keep_last, best=self.best_step, ranks=self.ranks)

    def _write_model(self, folder: Path) -> None:
        merged(self.student).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_card(folder, self)

    def _write_adapter(self, folder: Path) -> None:
        save_adapter(self.student, folder, self.config.student.model, self.dropped_layers)
