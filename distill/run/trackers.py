"""Experiment trackers: what a run tells TensorBoard, Weights & Biases, Trackio and MLflow.

Each tracker has a thread of its own, so that one which is slow or fails neither stops nor slows training. The run's own
logs are the truth: when a run is continued, so is the tracked run, which is told from them what it has not been told.
Left out: pictures, texts, model files.
"""

import contextlib
import importlib.util
import json
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import ConfigError
from distill.runtime import read_json_lines, write_whole

PROJECT = "distill"
SECONDS_TO_FINISH = 60


class TrackedRun(NamedTuple):
    """What a tracker is told when it is opened."""

    folder: Path
    id: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


Told = tuple[int, int, dict[str, float]]  # a number that grows, the step, the figures
Opened = tuple[Callable[[int, dict[str, float]], None], Callable[[bool], None]]  # hears figures; hears of the end


def _tensorboard(run: TrackedRun) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    # What is in the folder counts no more: all is told again.
    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=0, flush_secs=10)
    writer.add_text("config", f"```\n{json.dumps(run.config, indent=1)}\n```", 0)

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return write, lambda done: writer.close()


def _wandb(run: TrackedRun) -> Opened:
    import wandb

    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=run.id,
        resume="allow",
        dir=str(run.folder),
        config=run.config,
        settings=wandb.Settings(console="off"),
    )

    def write(step: int, figures: dict[str, float]) -> None:
        if step >= tracked.step:  # what its server holds of a continued run comes before
            tracked.log(figures, step=step)

    return write, lambda done: tracked.finish(exit_code=int(not done))


def _trackio(run: TrackedRun) -> Opened:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    # A run is continued by its name, which another folder may have too.
    tracked = trackio.init(project, name=f"{run.name}-{run.id}", resume="allow", config=run.config, embed=False)
    return lambda step, figures: tracked.log(figures, step=step), lambda done: tracked.finish()


def _mlflow(run: TrackedRun) -> Opened:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, experiment = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = client.get_experiment_by_name(experiment)
    place = found.experiment_id if found else client.create_experiment(experiment)
    earlier = client.search_runs([place], f"tags.distill_run = '{run.id}'")
    tracked = (earlier or [client.create_run(place, run_name=run.name, tags={"distill_run": run.id})])[0].info.run_id
    if earlier:
        client.update_run(tracked, status="RUNNING")
    else:
        sections = {name: keys for name, keys in run.config.items() if isinstance(keys, dict)}
        flat = {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
        flat |= {name: value for name, value in run.config.items() if name not in sections}
        client.log_batch(tracked, params=[Param(key, str(value)) for key, value in flat.items()])

    def write(step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(tracked, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    return write, lambda done: client.set_terminated(tracked, "FINISHED" if done else "KILLED")


# A kill takes what these have in memory, and they know themselves what they hold: they are told everything again.
RETOLD = {"tensorboard", "wandb"}
OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def check_installed(names: Sequence[str]) -> None:
    """Raises `ConfigError` for a tracker that is not installed, or that nobody is logged in to."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.report_to: {name} is not installed: pip install 'distill-on-policy[{name}]', or leave it out"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login()  # asks in a terminal, which a thread must not
        except wandb.Error as error:
            raise ConfigError(f"training.report_to: wandb: {error} Or set WANDB_MODE=offline") from None


class Trackers:
    """The trackers of a run, from entering this context to leaving it; `complete` tells them how it ended.

    `continued` where the logs in the folder are those of this run's first part. `report` hears of problems.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: dict[str, Any], continued: bool, report: Callable[[str], None]
    ) -> None:
        self.complete, self._report = False, report
        self._workers = [_Worker(name, folder, config, continued) for name in dict.fromkeys(names)]
        if continued and names:
            logs = (("train", "metrics"), ("eval", "evaluations"))
            earlier = [_told(kind, line) for kind, log in logs for line in read_json_lines(folder / f"{log}.jsonl")]
            for told in sorted(earlier, key=lambda told: told[0]):
                self._put(told)

    def __enter__(self) -> "Trackers":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_) -> None:
        self._put(self.complete)
        for worker in self._workers:
            worker.join(SECONDS_TO_FINISH)
            if worker.is_alive():
                self._report(f"{worker.name} has not taken everything within {SECONDS_TO_FINISH} s, and is left behind")
        self._tell()

    def log(self, metrics: dict[str, Any]) -> None:
        """Tells an optimizer step's metrics."""
        self._put(_told("train", metrics))

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """Tells a held-out evaluation's figures."""
        self._put(_told("eval", record))

    def _put(self, item: Told | bool) -> None:
        for worker in self._workers:
            worker.queue.put(item)
        self._tell()

    def _tell(self) -> None:
        for worker in self._workers:
            if worker.problem and not worker.reported:
                worker.reported = True
                self._report(worker.problem)


class _Worker(threading.Thread):
    """One tracker; in `folder/tracking` stands which tracked run is this one's, and the last that it was told."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any], continued: bool) -> None:
        super().__init__(name=name, daemon=True)
        self.problem, self.reported = "", False
        self.queue: queue.Queue[Told | bool] = queue.Queue()
        self._file = folder / "tracking" / f"{name}.json"
        known, self._last = uuid.uuid4().hex[:8], -1
        # A run that begins anew is another one, even where a kill left its folder.
        with contextlib.suppress(OSError, ValueError):
            if continued:
                known, self._last = json.loads(self._file.read_text())
        self._tracked = TrackedRun(folder, known, config)

    def run(self) -> None:
        last = -1 if self.name in RETOLD else self._last
        # What a tracker raises is its own; training goes on without it.
        try:
            self._remember(self._last)
            write, close = OPENERS[self.name](self._tracked)
        except Exception as error:
            self.problem = self._line("could not be opened", error)
            return
        while not isinstance(item := self.queue.get(), bool):
            order, step, figures = item
            if order > last:
                try:
                    write(step, figures)
                    self._remember(order)
                except Exception as error:
                    self.problem = self.problem or self._line("fails, and misses what it fails at", error)
        try:
            close(item)
        except Exception as error:
            self.problem = self.problem or self._line("could not be closed", error)

    def _remember(self, order: int) -> None:
        self._file.parent.mkdir(exist_ok=True)
        write_whole(self._file, json.dumps([self._tracked.id, order]).encode())

    def _line(self, what: str, error: Exception) -> str:
        return " ".join(f"{self.name} {what}: {type(error).__name__}: {error}".split())[:600]


def _told(kind: str, record: dict[str, Any]) -> Told:
    """The finite numbers of a record, those of a list by their place in it, and of each teacher, metric and set by its
    name."""
    figures = {}
    for key, value in _named(record).items():
        for place, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if key != "step" and isinstance(number, int | float) and math.isfinite(number):
                figures[f"{kind}/{key}" if place is None else f"{kind}/{key}/{place}"] = float(number)
    # An evaluation follows the step that it is named by.
    return 2 * record["step"] + (kind == "eval"), record["step"], figures


def _named(record: dict[str, Any]) -> dict[str, Any]:
    """A record's values, with those that it holds by teacher, metric and set under names that every tracker takes."""
    found = dict(record)
    for name, of in record.get("by_teacher", {}).items():
        found |= {f"{key}/{_taken(name)}": value for key, value in of.items()}
    for name, figures in record.get("metrics", {}).items():
        for key, value in figures.items():
            found[f"{_taken(name)}/{_taken(key)}"] = value["mean"] if isinstance(value, dict) else value
    for name, of in record.get("sets", {}).items():
        found |= {f"{_taken(name)}/{key}": value for key, value in _named(of).items()}
    return found


def _taken(name: str) -> str:
    """All that every tracker takes in a name."""
    return re.sub(r"[^a-zA-Z0-9_. -]", "_", name)
