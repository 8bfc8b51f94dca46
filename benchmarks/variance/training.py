"""Whole training runs: one ordinary `distill.train` process for each estimator, number of rollouts and seed.

A run that has its `summary.json` is not repeated, and one that was stopped continues from its checkpoint.
"""

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from benchmarks.variance.figures import fluctuation, standard_deviation
from benchmarks.variance.study import Study
from distill.config import load_config
from distill.runtime import read_json_lines

Changes = dict[str, dict[str, Any]]  # sections and keys


class Cell(NamedTuple):
    """One training run of the grid."""

    estimator: str
    num_rollouts: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.estimator}-n{self.num_rollouts}-seed{self.seed}"


class RunFailedError(RuntimeError):
    """A training run that ended with another status than 0, with the end of what it said."""


def cells(study: Study) -> list[Cell]:
    """The grid in the order in which it is run: a whole block with the first seed before the second."""
    grid = study.training
    return [
        Cell(estimator, n, seed)
        for block in grid.blocks
        for seed, n, estimator in itertools.product(grid.seeds, block.num_rollouts, block.estimators)
    ]


def overrides_of(study: Study, cell: Cell, folder: Path) -> Changes:
    """What a run changes in the recipe."""
    changes = {section: dict(keys) for section, keys in study.training.overrides.items()}
    changes["loss"] = changes.get("loss", {}) | study.estimators[cell.estimator]
    changes["training"] = changes.get("training", {}) | {
        "num_rollouts_per_prompt": cell.num_rollouts,
        "seed": cell.seed,
        "output_dir": str(folder),
    }
    return changes


def run_all(study: Study, recipe: Path, output: Path, progress: Progress) -> None:
    """Runs what is missing of the grid. Raises `RunFailedError` and, after a signal, `KeyboardInterrupt`."""
    grid = {cell.name: partial(overrides_of, study, cell) for cell in cells(study)}
    run_jobs("training runs", grid, recipe, output, progress, keep_models=study.training.keep_models)


def run_jobs(
    title: str,
    jobs: dict[str, Callable[[Path], Changes]],
    recipe: Path,
    output: Path,
    progress: Progress,
    *,
    keep_models: bool = False,
) -> None:
    """Runs each named job that is not finished, given what it changes in the recipe for its output folder."""
    task = progress.add_task(title, total=len(jobs))
    for name, changes in jobs.items():
        folder = output / "runs" / name
        if not (folder / "summary.json").exists():
            _run(folder, recipe, changes(folder), progress)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if not keep_models:
                shutil.rmtree(folder / "final", ignore_errors=True)
        progress.advance(task)


def _run(folder: Path, recipe: Path, changes: Changes, progress: Progress) -> None:
    load_config(recipe, changes)  # a wrong key is refused before anything is started
    options = [
        f"--{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for section, keys in changes.items()
        for key, value in keys.items()
    ]
    command = [sys.executable, "-m", "distill.train", "--config", str(recipe), *options]
    folder.parent.mkdir(parents=True, exist_ok=True)
    task = progress.add_task(f"  {folder.name}", total=None)
    log = folder.with_suffix(".log")
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        with _signals_go_to(process):
            while process.poll() is None:
                time.sleep(1)
                progress.update(task, completed=_lines(folder / "metrics.jsonl"), total=_total_steps(log))
    progress.remove_task(task)
    if process.returncode in (130, 143):
        raise KeyboardInterrupt
    if process.returncode:
        said = " ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
        raise RunFailedError(f"{folder.name} ended with status {process.returncode}: {said} (all of it in {log})")


@contextmanager
def _signals_go_to(process: subprocess.Popen) -> Iterator[None]:
    """SIGINT and SIGTERM are the training run's, which saves and ends; this process then ends after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A terminal's Ctrl-C reaches the whole process group by itself; SIGTERM reaches this process only.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _total_steps(log: Path) -> int | None:
    """From the run's own lines, `step  3/200  ...`."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("step "):
            return int(line.split("/")[1].split()[0])
    return None


def read_all(study: Study, output: Path) -> list[dict[str, Any]]:
    """The figures of every finished run of the grid."""
    finished = [cell for cell in cells(study) if (output / "runs" / cell.name / "summary.json").exists()]
    return [figures_of(cell, output / "runs" / cell.name, study.training.targets) for cell in finished]


def figures_of(cell: Cell, folder: Path, targets: Sequence[float]) -> dict[str, Any]:
    """One run's figures, from its files. `reverse_kl` is the sampled estimate, as the recipe logs it."""
    metrics = read_json_lines(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    evaluations = read_json_lines(folder / "evaluations.jsonl")
    prompt_of_step = {record["step"]: record["prompt"] for record in read_json_lines(folder / "rollouts.jsonl")}
    found: dict[str, Any] = cell._asdict()
    for key in ("reverse_kl", "reverse_kl_exact"):
        values = [record[key] for record in metrics]
        visits: dict[str, list[float]] = {}
        for record in metrics:
            visits.setdefault(prompt_of_step[record["step"]], []).append(record[key])
        late = [series[len(series) // 2 :] for series in visits.values()]
        epoch = len(visits)  # steps in one pass over the prompts, where a step is one prompt
        found |= {
            f"{key}_sd": standard_deviation(values),
            f"{key}_fluctuation": fluctuation(visits.values()),
            f"{key}_fluctuation_robust": fluctuation(visits.values(), robust=True),
            f"{key}_fluctuation_late": fluctuation(late),
            f"{key}_first": values[0],
            f"{key}_last": values[-1],
            f"{key}_start": sum(values[:epoch]) / len(values[:epoch]),
            f"{key}_end": sum(values[-epoch:]) / len(values[-epoch:]),
        }
        found[f"{key}_reduction"] = 1 - found[f"{key}_end"] / found[f"{key}_start"]
    found |= {
        "eval_before": summary["eval_reverse_kl_before"],
        "eval_after": summary["eval_reverse_kl_after"],
        "steps": summary["steps"],
        "tokens": summary["completion_tokens"],
        "wall_seconds": summary["wall_seconds"],
    }
    # On a CPU, what other work on the machine does not change: processor time, spread evenly over the steps.
    if summary["device"] == "cpu":
        clock = [summary["cpu_seconds"] / len(metrics)] * len(metrics)
    else:
        clock = [sum(v for key, v in record.items() if key.startswith("seconds_")) for record in metrics]
    found["seconds"] = sum(clock)
    for target in targets:
        found |= {f"{name}_to_{target:g}": value for name, value in reach(target, metrics, evaluations, clock).items()}
    return found


def reach(target: float, metrics: list[dict], evaluations: list[dict], clock: Sequence[float]) -> dict[str, float]:
    """Steps, sampled tokens and seconds until the held-out reverse KL is at `target`, interpolated; NaN if it never is.

    `clock` has each step's seconds.
    """
    tokens = [0, *itertools.accumulate(record["completion_tokens"] for record in metrics)]
    seconds = [0.0, *itertools.accumulate(clock)]
    for before, after in itertools.pairwise(evaluations):
        high, low = before["reverse_kl"], after["reverse_kl"]
        if high > target >= low:
            share = (high - target) / (high - low)
            steps = before["step"] + share * (after["step"] - before["step"])
            at = {
                name: series[before["step"]] + share * (series[after["step"]] - series[before["step"]])
                for name, series in (("tokens", tokens), ("seconds", seconds))
            }
            return {"steps": steps, **at}
    return {"steps": math.nan, "tokens": math.nan, "seconds": math.nan}
