"""One prompt: many rollouts a step against few, at as many steps and at as many samples."""

from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.variance.study import SingleStudy
from benchmarks.variance.training import Cell, Changes, figures_of, run_jobs


def run_all(study: SingleStudy, output: Path, progress: Progress) -> list[dict[str, Any]]:
    """Runs what is missing and gives the figures of every run."""
    grid = {f"single-n{n}-steps{steps}-seed{seed}": (n, steps, seed) for n, steps in study.runs for seed in study.seeds}

    def changes_of(n: int, steps: int, seed: int, folder: Path) -> Changes:
        changes = {section: dict(keys) for section, keys in study.overrides.items()}
        changes["training"] = changes.get("training", {}) | {
            "num_rollouts_per_prompt": n,
            "num_epochs": steps,  # of one prompt, so one step each
            "eval_every": max(1, steps // 4),
            "seed": seed,
            "output_dir": str(folder),
        }
        return changes

    jobs = {name: (lambda folder, cell=cell: changes_of(*cell, folder)) for name, cell in grid.items()}
    run_jobs("one prompt", jobs, study.recipe, output, progress)
    return [figures_of(Cell(name, n, seed), output / "runs" / name, ()) for name, (n, _, seed) in grid.items()]
