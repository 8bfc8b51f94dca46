"""`python -m benchmarks.variance --config RECIPE [--quick] [--output DIR] [--only PART]`: the command.

Everything that is finished stays: the same command goes on where it was stopped.
Exit status as that of `distill.train`: 0 done, 2 what cannot be used, 130 stopped.
"""

import argparse
import itertools
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.variance import tables, training
from benchmarks.variance.study import HERE, Study, load_study
from distill.config import ConfigError
from distill.metrics import read_json_lines

PARTS = ("training",)


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    console = Console()
    try:
        study = load_study(arguments.study)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            for part in [arguments.only] if arguments.only else PARTS:
                _run_part(part, study, arguments.config, arguments.output, progress)
    except (ConfigError, training.RunFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on from here; {arguments.output} keeps what is done", file=sys.stderr)
        return 130
    console.print(f"tables and plots: {arguments.output}", highlight=False, soft_wrap=True)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variance", description="The variance study.")
    parser.add_argument("--config", type=Path, required=True, help="the recipe: an ordinary run's configuration")
    parser.add_argument("--quick", action="store_true", help="ten minutes on two CPU cores instead of a night")
    parser.add_argument("--study", type=Path, help="a grid of your own instead of full.yaml or quick.yaml")
    parser.add_argument("--output", type=Path, help="folder; outputs/variance or outputs/variance-quick if absent")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    arguments = parser.parse_args(argv)
    arguments.study = arguments.study or HERE / ("quick.yaml" if arguments.quick else "full.yaml")
    arguments.output = arguments.output or Path("outputs") / ("variance-quick" if arguments.quick else "variance")
    return arguments


def _run_part(part: str, study: Study, recipe: Path, output: Path, progress: Progress) -> None:
    output.mkdir(parents=True, exist_ok=True)
    training.run_all(study, recipe, output, progress)
    records = training.read_all(study, output)
    tables.write_csv(output / "training.csv", records)
    (output / "training.md").write_text(tables.training_tables(records, study.training.targets), encoding="utf-8")
    tables.plot_training(output, records, lambda record: _held_out(output, record))


def _held_out(output: Path, record: tables.Record) -> list[tuple[int, float]]:
    """Sampled tokens and held-out reverse KL at each evaluation of a run."""
    cell = training.Cell(record["estimator"], record["num_rollouts"], record["seed"])
    folder = output / "runs" / cell.name
    metrics = read_json_lines(folder / "metrics.jsonl")
    tokens = [0, *itertools.accumulate(line["completion_tokens"] for line in metrics)]
    return [(tokens[e["step"]], e["reverse_kl"]) for e in read_json_lines(folder / "evaluations.jsonl")]


if __name__ == "__main__":
    sys.exit(main())
