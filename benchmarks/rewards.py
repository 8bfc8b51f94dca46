"""The teacher alone, the reward alone, and both: `python -m benchmarks.rewards`, whole runs of a recipe with a reward.

A run that has its `summary.json` is not repeated, and one that was stopped goes on. `--page FILE` puts the table
between the two markers of a page.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import markdown, summary_of, write
from benchmarks.variance.figures import interval
from distill.config import Config, load_config

Summaries = dict[str, list[dict[str, Any]]]


def arms(config: Config) -> dict[str, list[str]]:
    """What each arm changes, as words for the command line."""
    watched = [reward.model_dump(mode="json") | {"weight": 0} for reward in config.rewards]
    return {
        "the teacher alone": ["--rewards", json.dumps(watched)],
        "the reward alone": ["--loss.objective", "rewards"],
        "both": [],
    }


def run_all(recipe: Path, seeds: Sequence[int], output: Path, words: Sequence[str]) -> Summaries:
    """The summaries of each arm's runs, which are made where they are not there."""
    found: Summaries = {}
    for arm, changes in arms(load_config(recipe)).items():
        for seed in seeds:
            folder = output / f"{arm.replace(' ', '-')}-{seed}"
            own = ["--training.seed", str(seed), *changes, *words]
            found.setdefault(arm, []).append(summary_of(recipe, folder, own))
    return found


def table(found: Summaries) -> str:
    """Markdown: a row an arm, means over seeds with 95 % t-intervals, before and after."""
    metrics = []
    for name, figures in next(iter(found.values()))[0]["eval_metrics"]["main"].items():
        passes = [figure for figure in figures if figure.startswith("pass@")]
        metrics += [(name, figure) for figure in dict.fromkeys((passes[0], passes[-1]))]
    head = ["", "held-out reverse KL, nats per token", *(f"{name}, {figure}, %" for name, figure in metrics), "seconds"]
    first = next(iter(found.values()))
    rows = [[*_row("before", first[:1], metrics, "before")[:-1], ""]]
    rows += [_row(arm, summaries, metrics, "after") for arm, summaries in found.items()]
    return markdown([head, *rows])


def _row(name: str, found: list[dict], metrics: list[tuple[str, str]], when: str) -> list[str]:
    kl = interval([summary[f"eval_reverse_kl_{when}"] for summary in found]).text()
    rates = [
        interval([100 * summary["eval_metrics"]["main"][metric][figure][when]["mean"] for summary in found])
        for metric, figure in metrics
    ]
    seconds = interval([summary["wall_seconds"] for summary in found]).mean
    return [name, kl, *(rate.text("{:.0f}") for rate in rates), f"{seconds:.0f}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewards", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/json.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("outputs/json-arms"))
    parser.add_argument("--page", type=Path)
    options, words = parser.parse_known_args(argv)
    lines = table(run_all(options.config, options.seeds, options.output, words))
    print(lines)
    if options.page:
        write(options.page, parser.prog, lines)


if __name__ == "__main__":
    main()
