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

from benchmarks.variance import fixed, pool, single, split, tables, training
from benchmarks.variance.study import HERE, Study, load_study
from distill.config import Config, ConfigError, load_config
from distill.models import ModelError
from distill.prompts import PromptError
from distill.run import OutputError
from distill.runtime import read_json_lines

PLOTS = {
    "fixed": {"fixed": "Relative variance and cosine of a group's gradient against N"},
    "split": {"split": "Variance of a step's gradient at 64 completions, within and between prompts"},
    "training": {
        "fluctuation": "De-trended standard deviation of a step's KL against N",
        "held_out": "Held-out reverse KL against sampled tokens",
    },
    "single": {"single": "Reverse KL on new completions of one prompt against completions, by N"},
}
PARTS = ("fixed", "split", "training", "single")


class NothingFinishedError(ConfigError):
    """Tables alone are wanted of a part that has none."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    console = Console()
    try:
        study = load_study(arguments.study)
        if arguments.only and not study.has(arguments.only):
            raise ConfigError(f"{arguments.study}: has no part {arguments.only!r}")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            for part in [arguments.only] if arguments.only else filter(study.has, PARTS):
                try:
                    _run_part(part, study, arguments, progress)
                except NothingFinishedError as error:
                    if arguments.only:
                        raise
                    console.print(f"left out: {error}", highlight=False, soft_wrap=True)
                    continue
                if arguments.page:
                    tables.fill_page(arguments.page, part, arguments.output, PLOTS.get(part, {}))
    except (ConfigError, ModelError, OutputError, PromptError, training.RunFailedError) as error:
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
    parser.add_argument("--policy", help="a model for `fixed` and `split` instead of the recipe's untrained student")
    parser.add_argument("--page", type=Path, help="a Markdown page whose marked sections the tables and plots go into")
    parser.add_argument("--tables", action="store_true", help="tables and plots of what is finished; nothing is run")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    arguments = parser.parse_args(argv)
    arguments.study = arguments.study or HERE / ("quick.yaml" if arguments.quick else "full.yaml")
    arguments.output = arguments.output or Path("outputs") / ("variance-quick" if arguments.quick else "variance")
    return arguments


def _run_part(part: str, study: Study, arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs what is missing of a part, unless tables alone are wanted, then writes its tables and plots."""
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    if part == "training":
        if not arguments.tables:
            training.run_all(study, arguments.config, output, progress)
        records = _finished(part, training.read_all(study, output))
        tables.plot_training(output, records, lambda record: _held_out(output, record))
        text = tables.training_tables(records, study.training.targets)
    elif part == "single":
        if not arguments.tables:
            single.run_all(study.single, output, progress)
        records = _finished(part, single.read_all(study.single, output))
        tables.plot_single(output / "single.png", records)
        text = tables.single_tables(records)
    else:
        records, text = _from_pools(part, study, arguments, progress)
    tables.write_csv(output / f"{part}.csv", [{k: v for k, v in r.items() if k != "per_prompt"} for r in records])
    (output / f"{part}.md").write_text(text, encoding="utf-8")


def _from_pools(
    part: str, study: Study, arguments: argparse.Namespace, progress: Progress
) -> tuple[list[tables.Record], str]:
    """Records and tables of the two parts at a fixed policy."""
    grid, output = getattr(study, part), arguments.output
    config = _config_of(arguments.config, grid.overrides, arguments.policy, output / "pools" / "run")
    estimators = study.loss_options(config, grid.estimators)
    if not arguments.tables:
        pool.make_pools(part, config, estimators, grid.prompts, grid.pool, output, progress)
    pools = _finished(part, pool.read_pools(part, grid.prompts, output))
    if part == "split":
        records = split.measure(pools, estimators, grid.layouts)
        tables.plot_split(output / "split.png", records)
        return records, tables.split_tables(records)
    records = fixed.measure(pools, estimators, grid.num_rollouts)
    tables.plot_fixed(output / "fixed.png", records)
    compared = fixed.against(records, ("reverse_kl", 4), ("sampled_reverse_kl", max(grid.num_rollouts)))
    return records, tables.fixed_tables(records, fixed.sketch_error(pools), compared)


def _finished(part: str, found: list) -> list:
    if not found:
        raise NothingFinishedError(f"nothing of the part {part!r} is finished yet; run it without --tables")
    return found


def _config_of(recipe: Path, overrides: dict, policy: str | None, folder: Path) -> Config:
    """The recipe as a pool needs it: with the policy to sample from, and nothing of a run's."""
    changes = {section: dict(keys) for section, keys in overrides.items()}
    changes["training"] = changes.get("training", {}) | {"resume": "never", "output_dir": str(folder)}
    if policy is not None:
        changes["student"] = changes.get("student", {}) | {"model": policy, "drop_layers": []}
    return load_config(recipe, changes)


def _held_out(output: Path, record: tables.Record) -> list[tuple[int, float]]:
    """Sampled tokens and held-out reverse KL at each evaluation of a run."""
    cell = training.Cell(record["estimator"], record["num_rollouts"], record["seed"])
    folder = output / "runs" / cell.name
    metrics = read_json_lines(folder / "metrics.jsonl")
    tokens = [0, *itertools.accumulate(line["completion_tokens"] for line in metrics)]
    return [(tokens[e["step"]], e["reverse_kl"]) for e in read_json_lines(folder / "evaluations.jsonl")]


if __name__ == "__main__":
    sys.exit(main())
