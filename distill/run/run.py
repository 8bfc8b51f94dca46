"""One run, from a configuration to a trained model and every output file.

The trainer takes the steps. What a run is made of is in parts.py, what happens between two steps in progress.py, what
is written at the end in ending.py; here stands the order in which they come, and what ends a run early.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals

from rich.console import Console

from distill.config import Config, to_yaml
from distill.run import checkpoint
from distill.run.display import Display
from distill.run.early_stopping import target_of
from distill.run.ending import write_models, write_summary
from distill.run.hub import HubError, prepare_repository, push
from distill.run.judges import Judges
from distill.run.live_report import LiveReport
from distill.run.loading import choose_device
from distill.run.output import NoOutput, OutputError, OutputFolder
from distill.run.parts import RunParts
from distill.run.progress import Progress
from distill.run.summary import Summary
from distill.run.trackers import Trackers, check_installed
from distill.runtime import MemoryLimitError
from distill.servers import ServerError
from distill.training import Ranks, started_tasks


class Run:
    """A run's models, files and progress; `execute` does it all."""

    summary: Summary | None = None
    """What it amounts to, once it is done, on rank 0."""
    stopped: Signals | None = None
    """The signal that ended it early."""

    def __init__(
        self,
        config: Config,
        console: Console,
        received_signal: Callable[[], Signals | None],
        ranks: Ranks | None = None,
    ) -> None:
        """Loads everything and finds what to continue from. Raises what `RunParts` raises, `OutputError`, `HubError`,
        and `FunctionError` for a metric or a reward."""
        self.config, self.console, self.ranks = config, console, ranks or Ranks()
        self.received_signal = lambda: self.ranks.signal(received_signal())
        began = time.monotonic(), time.process_time()
        device = choose_device(config.training.device, self.ranks)
        check_installed(config.training.report_to)
        if config.training.hub_id:
            self.ranks.together(lambda: None if self.ranks.rank else prepare_repository(config.training), (HubError,))
        # First of all: a folder that is in use or cannot be written should not cost the loading of two models.
        kind = NoOutput if self.ranks.rank else OutputFolder
        self.output = self.ranks.together(lambda: kind(config.training.output_dir), (OutputError,))
        self.report = LiveReport(self.output)
        self._open = contextlib.ExitStack()
        self._open.callback(self.output.release)
        try:
            judges = Judges.of_run(config, self.ranks)
            target = target_of(config, judges)
            self._open.enter_context(judges)
            self.start = self._find_checkpoint()
            tasks = self._open.enter_context(started_tasks(config.rewards, self.ranks))
            self.parts = RunParts(config, device, console, self.ranks, self.start, tasks)
            self.progress = Progress(self.parts, judges, target, self.output, self.start, began)
            if self.ranks.size > 1:
                self.parts.tell(self.ranks.describe(self.parts.student))
        except BaseException:
            self._open.close()
            raise

    def execute(self) -> int:
        """Trains, evaluates and writes everything; returns the exit status."""
        progress, trainer = self.progress, self.parts.trainer
        display = Display(self.parts.total_steps, progress.step, self.console)
        trainer.on_phase = display.phase
        self.parts.limits.report = lambda message: progress.notice("memory", progress.step + 1, message)
        for server in self.parts.servers:
            server.report = lambda message: progress.notice("server", progress.step + 1, message)
        if self.parts.rewards:
            self.parts.rewards.report = lambda message: progress.notice("reward", progress.step + 1, message)
        try:
            self.ranks.meet()  # all have read what may be set aside
            self._open_folder()
            trackers = Trackers(
                () if self.ranks.rank else self.config.training.report_to,
                self.output.path,
                self.config.model_dump(mode="json"),
                self.start is not None,
                lambda message: progress.notice("tracker", progress.step, message),
            )
            progress.begin(display, trackers)
            for event, message in self.parts.notices:
                progress.notice(event, progress.step, message)
            with trackers, display:
                self.stopped = self._train_or_save()
                if self.stopped:
                    return 128 + self.stopped
                display.phase("writing the model")
                write_models(self.parts, progress, self.output)
                trackers.complete = True
            if self.ranks.rank == 0:
                self.summary = write_summary(self.parts, progress, self.output, self.report, self.console)
            if self.config.training.hub_id:
                self.ranks.together(self._push, (HubError,))
        finally:
            self._open.close()
        return 0

    def _push(self) -> None:
        """On rank 0, when nothing can be lost any more."""
        if self.ranks.rank == 0:
            message = f"{self.summary.steps} steps of on-policy distillation of {self.config.student.model}"
            where = push(self.config.training.hub_id, self.output.path / "final", message)
            self.parts.tell(f"pushed to {where}")

    def _train_or_save(self) -> Signals | None:
        """Trains; what a run can be continued after is raised with everything saved."""
        try:
            return self._train()
        except (MemoryLimitError, ServerError) as error:
            if self.ranks.sharded and isinstance(error, MemoryLimitError):  # the others do not know of it
                raise
            # Nothing of the step at hand has been applied.
            self.parts.trainer.optimizer.zero_grad(set_to_none=True)
            self.progress.save()
            raise type(error)(f"{error}. Saved after step {self.progress.step}") from None

    def _train(self) -> Signals | None:
        """Takes every step that is left; returns the signal that ended it early, with everything saved."""
        progress, training = self.progress, self.config.training
        if not progress.evaluations:
            progress.evaluate()
        total = self.parts.total_steps
        if progress.step == total or progress.enough:
            return None
        if stop := self.received_signal():  # while the models were loaded
            return self._stopped(stop)
        warm_start = self.parts.warm_start.steps() if self.parts.warm_start else ()
        for result in itertools.chain(warm_start, self.parts.trainer.steps()):
            progress.record(result)
            progress.inspect(result)
            step, last, warmed = progress.step, progress.step == total, progress.warm_start_ends
            best_before = progress.best_step
            if evaluated := last or warmed or (training.eval_every and progress.in_phase % training.eval_every == 0):
                progress.evaluate()
            if not last and (reason := progress.enough):
                progress.notice("early_stopping", step, f"{reason}: the run ends after step {step}")
                last = True
            stop = self.received_signal()
            if stop and not last:
                return self._stopped(stop)
            due = warmed or progress.in_phase % training.save_every == 0
            if saved := last or due or progress.best_step != best_before:
                progress.save()
            if last:
                break
            if evaluated or saved:
                self.report.write()
        return None

    def _stopped(self, stop: Signals) -> Signals:
        self.progress.save()
        self.report.finish()
        saved = f"{stop.name}: saved after step {self.progress.step}"
        self.progress.display.message(f"{saved}; the same command continues from there")
        return stop

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to continue from, which rank 0 decides."""
        ranks, where = self.ranks, (self.config.training.resume, self.output.checkpoints)
        found = ranks.together(lambda: None if ranks.rank else checkpoint.find(*where), (checkpoint.CheckpointError,))
        path = ranks.of_first(found and str(found.path))
        return checkpoint.load(Path(path), verify=False) if path and ranks.rank else found

    def _open_folder(self) -> None:
        """Sets an earlier run's folder aside where this one starts over, and opens the files that grow."""
        began, finished = (self.output.path / name for name in ("metrics.jsonl", "final"))
        # A finished run is never written over, even when its checkpoints were removed to make room.
        over = began.exists() if self.config.training.resume == "never" else finished.exists()
        if self.start is None and over:
            kept = self.output.set_aside()
            self.parts.tell(f"the earlier run's folder is now {kept}")
        if self.start:
            with self.output.writing("the damaged checkpoints' new names"):
                checkpoint.set_aside_newer(self.output.checkpoints, self.start.step)
        self.output.open_logs(self.start)
        self.output.write_text("config.yaml", to_yaml(self.config))
        if self.parts.layer_choice:
            self.output.write_text("layers.json", json.dumps(self.parts.layer_choice, indent=1))
