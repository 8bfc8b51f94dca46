"""What sampling more prompts together gains in speed, and what it loses as later steps learn from older rollouts.

    python -m benchmarks.staleness [--batches 4 8 16] [--seeds 0 1 2] [--output outputs/staleness]

Runs `configs/default.yaml` with each `rollout.prompts_per_batch` and seed, and prints a Markdown table over the seeds:
held-out reverse KL after the same steps and after the same minutes. Minutes are the median step's rollout, score and
update times the steps, so the machine should have nothing else to do. Runs that are done are not repeated.
"""

import argparse
import itertools
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.test_command import PHASES, RECIPE, run_command
from benchmarks.variance.figures import interval
from distill.runtime import read_json_lines

CHANGES = {"evaluation.num_rollouts_per_prompt": 4}


@dataclass(frozen=True)
class Run:
    step_minutes: float
    """Rollout, score and update of the median step."""
    reverse_kl: dict[int, float]
    """Held-out, by the steps before it, in nats a token."""
    gap: float
    """What the log-probability of a token changed between sampling and learning, in nats, mean over all steps."""

    @property
    def last(self) -> int:
        return max(self.reverse_kl)

    def after(self, minutes: float) -> float:
        """Held-out reverse KL after so many minutes, on a line between two evaluations."""
        points = [(self.step_minutes * step, value) for step, value in sorted(self.reverse_kl.items())]
        for (start, before), (stop, value) in itertools.pairwise(points):
            if minutes <= stop:
                return before + (value - before) * (minutes - start) / (stop - start)
        return points[-1][1]


def run(batch: int, seed: int, folder: Path) -> Run:
    """The run in `folder`, which is made, or continued, if it is not done."""
    if not (folder / "summary.json").exists():
        changes = CHANGES | {"rollout.prompts_per_batch": batch, "training.seed": seed}
        run_command(RECIPE, changes, folder.resolve())
    for kept in ("checkpoints", "final"):  # gigabytes
        shutil.rmtree(folder / kept, ignore_errors=True)
    steps, held_out = (read_json_lines(folder / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    return Run(
        step_minutes=statistics.median(sum(step[f"seconds_{phase}"] for phase in PHASES) for step in steps) / 60,
        reverse_kl={line["step"]: line["reverse_kl"] for line in held_out},
        gap=statistics.fmean(step["sampler_logprob_gap"] for step in steps),
    )


def table(runs: dict[int, list[Run]]) -> str:
    """A line for each number of prompts; a difference is to the first of them, between runs of one seed."""
    base, *_ = runs.values()
    last = base[0].last
    shortest = last * min(statistics.fmean(found.step_minutes for found in line) for line in runs.values())
    heads = [
        "prompts a batch",
        "change of log p until learnt from",
        f"KL after {last // 2} steps",
        f"after {last}",
        "difference",
        f"minutes for {last}",
        f"KL after {shortest:.1f} min",
        "difference",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for batch, found in runs.items():
        timed = [one.after(shortest) for one in found]
        apart = [one.reverse_kl[last] - other.reverse_kl[last] for one, other in zip(found, base, strict=True)]
        timed_apart = [value - other.after(shortest) for value, other in zip(timed, base, strict=True)]
        cells = [
            str(batch),
            interval([one.gap for one in found]).text(),
            interval([one.reverse_kl[last // 2] for one in found]).text(),
            interval([one.reverse_kl[last] for one in found]).text(),
            _difference(apart) if found is not base else "",
            interval([last * one.step_minutes for one in found]).text("{:.2f}"),
            interval(timed).text(),
            _difference(timed_apart) if found is not base else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(values: list[float]) -> str:
    text = interval(values).text()
    return text if text.startswith("-") else f"+{text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("outputs/staleness"))
    options = parser.parse_args()
    runs: dict[int, list[Run]] = {batch: [] for batch in options.batches}
    for seed, batch in itertools.product(options.seeds, options.batches):
        runs[batch].append(run(batch, seed, options.output / f"{batch}-prompts-seed{seed}"))
    print(f"{len(options.seeds)} seeds, mean ± half of the 95 % interval over them\n\n{table(runs)}")


if __name__ == "__main__":
    main()
