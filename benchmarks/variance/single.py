"""One prompt: many rollouts a step against few, at as many steps and at as many samples."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.variance.study import SingleStudy
from benchmarks.variance.training import Cell, Changes, figures_of, run_jobs
from distill.runtime import read_json_lines

# Completions between evaluations, so that every number of rollouts is evaluated after as many; short runs have four.
EVALUATED_EVERY = 1280


def run_all(study: SingleStudy, output: Path, progress: Progress) -> None:
    """Runs what is missing."""
    jobs = {name: partial(_changes, study, *run) for name, run in _grid(study).items()}
    run_jobs("one prompt", jobs, study.recipe, output, progress)


def read_all(study: SingleStudy, output: Path) -> list[dict[str, Any]]:
    """The figures of every finished run, and `curve`: completions so far and KL at each of its evaluations."""
    found = []
    for name, (n, _, seed) in _grid(study).items():
        folder = output / "runs" / name
        if (folder / "summary.json").exists():
            evaluations = read_json_lines(folder / "evaluations.jsonl")
            curve = {n * line["step"]: line["reverse_kl"] for line in evaluations}
            found.append(figures_of(Cell(name, n, seed), folder, ()) | {"curve": curve})
    return found


def _grid(study: SingleStudy) -> dict[str, tuple[int, int, int]]:
    """Rollouts, steps and seed by name."""
    return {f"single-n{n}-steps{steps}-seed{seed}": (n, steps, seed) for seed in study.seeds for n, steps in study.runs}


def _changes(study: SingleStudy, n: int, steps: int, seed: int, folder: Path) -> Changes:
    changes = {section: dict(keys) for section, keys in study.overrides.items()}
    apart = EVALUATED_EVERY // n
    changes["training"] = changes.get("training", {}) | {
        "num_rollouts_per_prompt": n,
        "num_epochs": steps,  # of one prompt, so one step each
        "eval_every": max(1, apart if apart <= steps else steps // 4),
        "save_every": max(20, steps // 16),  # a checkpoint is 1.6 GB: hundreds would take longer than the steps
        "seed": seed,
        "output_dir": str(folder),
    }
    return changes
