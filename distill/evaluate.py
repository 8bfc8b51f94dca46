"""Held-out evaluation: the exact reverse KL on the student's own completions of prompts it never trained on.

`python -m distill.evaluate --student A --teacher B --prompts FILE` compares any two models of one vocabulary;
`python -m distill.evaluate --run RUN` a run's trained model and its teachers, each with the prompts that it saw there.
`--metrics NAME ...` judges the completions too; without a teacher that is all.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.config import Config, ConfigError, load_config
from distill.grading import FunctionError
from distill.loss import Group, check_sharing
from distill.models import ModelError
from distill.prompts import PromptError, left_pad
from distill.report import MAIN_SET, figures_of, shown_figures
from distill.run import (
    SAMPLER,
    Judges,
    choose_device,
    choose_dtype,
    failures,
    load_alone,
    load_pair,
    load_prompt_sets,
    make_engine,
)
from distill.runtime import MemoryLimitError, MemoryLimits
from distill.servers import ServerError
from distill.training import compare, judged_figures


class Request(NamedTuple):
    """What is looked at."""

    config: Config
    metrics: tuple[str, ...]
    alone: bool
    """Whether there is no teacher, and metrics are all that is asked for."""


class Answer(NamedTuple):
    """What was found."""

    figures: dict[str, dict[str, float]]
    """Of the two models by name, each with `mean`, `low` and `high`."""
    metrics: dict[str, dict[str, Any]]

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, mean and interval of each figure, for the table."""
        found = {name.replace("_", " "): figure for name, figure in self.figures.items()}
        for metric, of_metric in self.metrics.items():
            figures = figures_of(of_metric)
            found |= {f"{metric} {name}": figures[name] for name in shown_figures(figures, every=True)}
        return [
            (
                name,
                "–" if figure["mean"] is None else f"{figure['mean']:.4f}",
                "–" if figure["low"] is None else f"{figure['low']:.4f} to {figure['high']:.4f}",
            )
            for name, figure in found.items()
        ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.evaluate",
        description="Exact reverse and forward KL, agreement of the likeliest token, and perplexity of two models on "
        "completions that one of them samples.",
    )
    parser.add_argument(
        "--run",
        metavar="RUN",
        help="a run's folder, whose final model, teachers and held-out prompts "
        "are taken as its configuration says; --student, --teacher and --prompts replace them",
    )
    parser.add_argument("--set", metavar="NAME", help="of --run, one of its evaluation.sets instead of prompts.eval")
    parser.add_argument("--student", metavar="MODEL", help="for example outputs/default/final")
    parser.add_argument(
        "--teacher", metavar="MODEL", help="a model of the same vocabulary; with --metrics it can be absent"
    )
    parser.add_argument("--prompts", metavar="FILE", help="any file that prompts.eval takes")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="what judges each completion, as evaluation.metrics: a built-in name, or FILE.py:FUNCTION",
    )
    parser.add_argument("--num-rollouts", type=int, help="completions of each prompt (4)")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion (128)")
    parser.add_argument("--temperature", type=float, help="of the sampling (1); figures are at 1")
    parser.add_argument("--sample-from", choices=("student", "teacher"), default="student")
    parser.add_argument("--seed", type=int, help="of the sampling (1234)")
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the models' folders ship")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 for what the user can mend."""
    options, console = _parser().parse_args(argv), Console()
    try:
        request = _request(options)
        answer = _answer(request, options.sample_from, console)
    except ValidationError as error:
        problem = error.errors()[0]
        print(f"{problem['loc'][-1]}: found {problem['input']!r}: {problem['msg']}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"{error}; or give --teacher MODEL", file=sys.stderr)
        return 2
    except (ConfigError, ModelError, PromptError, FunctionError, MemoryLimitError) as error:
        print(error, file=sys.stderr)
        return 2
    table = Table("on completions of the " + options.sample_from, "mean", "95 %", box=None)
    for row in answer.rows():
        table.add_row(*map(escape, row))
    console.print(table)
    if options.json:
        config = request.config
        asked = {
            "num_rollouts": config.evaluation.num_rollouts_per_prompt,
            "max_new_tokens": config.rollout.max_new_tokens,
            "temperature": config.rollout.temperature,
            "seed": config.evaluation.seed,
        }
        record = vars(options) | asked | answer.figures | ({"metrics": answer.metrics} if answer.metrics else {})
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    return 0


def _request(options: argparse.Namespace) -> Request:
    """What is compared: models of a run, or any. Raises `ConfigError`."""
    given = {
        "student": {"model": options.student, "trust_remote_code": options.trust_remote_code or None},
        "teacher": {"model": options.teacher, "trust_remote_code": options.trust_remote_code or None},
        "prompts": {"train": options.prompts},
        "rollout": {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature},
        "training": {"device": options.device, "precision": options.precision},
        "evaluation": {"num_rollouts_per_prompt": options.num_rollouts, "seed": options.seed},
    }
    sections = {name: {key: x for key, x in keys.items() if x is not None} for name, keys in given.items()}
    if options.run:
        config, metrics = _of_run(Path(options.run), sections, options.set)
        return Request(config, metrics if options.metrics is None else tuple(options.metrics), alone=False)
    if options.set:
        raise ConfigError("--set names one of the held-out sets of a run: give --run too")
    needed = ("student", "prompts") if options.metrics else ("student", "teacher", "prompts")
    if absent := [f"--{name}" for name in needed if not getattr(options, name)]:
        raise ConfigError(f"{', '.join(absent)}: missing; give them, or --run with the folder of a run")
    sections["evaluation"].setdefault("num_rollouts_per_prompt", 4)
    sections["teacher"].setdefault("model", options.student)  # which is not loaded
    return Request(Config(**sections), tuple(options.metrics or ()), alone=not options.teacher)


def _of_run(run: Path, sections: dict[str, dict[str, Any]], name: str | None) -> tuple[Config, tuple[str, ...]]:
    """A run's configuration with what is given over it, and its metrics: its trained model, the teachers of its first
    step, and its held-out prompts or those of the set `name`."""
    config = load_config(run / "config.yaml")
    if not (run / "final").is_dir() and "model" not in sections["student"]:
        raise ConfigError(f"{run}: a run's folder without final/, which is written at the run's end")
    asked, metrics = _of_set(run, config, name)
    # `base` is the student before it was trained.
    teachers = {name: each.model_dump() for name, each in config.teacher.resolved(config.student).items()}
    whole = {"model": str(run / "final"), "drop_layers": (), "lora": None}
    over = {
        "student": whole | sections["student"],
        "teacher": {
            **teachers.pop(None),
            "update": "frozen",
            "server_gives": "hidden" if config.teacher.served() else "auto",  # figures are of whole distributions
            "others": teachers,
            **sections["teacher"],
        },
        "prompts": {"eval": None, **asked["prompts"], **sections["prompts"]},
        "rollout": {
            "engine": "auto",
            "server": None,
            "async_batches": 0,
            **asked["rollout"],
            **sections["rollout"],
        },
        "training": {"eval_every": None, "early_stopping": None, "parallel": "replicate", **sections["training"]},
        # Prompts are read as those of training, so what judges them stands beside the configuration.
        "evaluation": {"metrics": (), "sets": {}, **asked["evaluation"], **sections["evaluation"]},
    }
    if "model" in sections["teacher"]:
        over["teacher"]["server"] = None
    return load_config(run / "config.yaml", over), metrics


def _of_set(run: Path, config: Config, name: str | None) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """What a run, or its set `name`, says of prompts and completions, by section, and its metrics."""
    settings, prompts = config.evaluation, config.prompts
    length = settings.max_new_tokens or config.rollout.max_new_tokens
    if name is None:
        held_out, limit = (prompts.eval, prompts.eval_limit) if prompts.eval else (prompts.train, prompts.limit)
        found = {"prompts": {"train": str(held_out), "limit": limit}, "rollout": {"max_new_tokens": length}}
        return found | {"evaluation": {}}, settings.metrics
    if name not in settings.sets:
        raise ConfigError(f"--set: found {name!r}; the sets of {run} are {', '.join(settings.sets) or 'none'}")
    own = settings.sets[name]
    drawn = {key: getattr(own, key) for key in SAMPLER if getattr(own, key) is not None}
    count = own.num_rollouts_per_prompt or settings.num_rollouts_per_prompt
    found = {
        "prompts": {"train": str(own.prompts), "limit": own.limit},
        "rollout": {"max_new_tokens": own.max_new_tokens or length, **drawn},
        "evaluation": {"num_rollouts_per_prompt": count},
    }
    return found, settings.metrics if own.metrics is None else own.metrics


def _answer(request: Request, sample_from: str, console: Console) -> Answer:
    key = "evaluation.metrics"
    timeout = request.config.evaluation.timeout_seconds
    with Judges({MAIN_SET: (key, request.metrics)}, timeout_seconds=timeout) as judges:
        return _evaluate_models(request, sample_from, judges, console)


def _evaluate_models(request: Request, sample_from: str, judges: Judges, console: Console) -> Answer:
    config, device = request.config, choose_device(request.config.training.device)
    load = load_alone if request.alone else load_pair
    pair = load(config, device, choose_dtype(config.training.precision, device))
    found = load_prompt_sets(config, pair, console)[0]
    prompts, seen = found.student, found.teacher
    for line in found.remarks:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if sample_from == "teacher" and (problem := _no_sampler(request, pair.teachers)):
        raise ConfigError(f"--sample-from teacher: {problem}")
    for model in (pair.student_parts, *(teacher.parts for teacher in pair.teachers)):
        check_sharing(model)
    limits = MemoryLimits(config.training.tokens_per_micro_batch, device=device)
    sampler, parts = pair.student, pair.student_parts
    if sample_from == "teacher":
        sampler, parts = pair.teachers[0].model, pair.teachers[0].parts
    precision = str(pair.student_parts.dtype).removeprefix("torch.")
    view = seen and seen.view(range(len(prompts)))
    own = left_pad(prompts.token_ids, pair.tokenizer.pad_token_id)
    asked = view.prompts[0] if view and sample_from == "teacher" else own
    ids, mask = (tensor.to(device) for tensor in asked)
    count = config.evaluation.num_rollouts_per_prompt
    with console.status(f"{len(prompts)} prompts, {count} completions of each"):
        with parts.present():
            engine = make_engine(sampler, config, pair.tokenizer, pair.vocab_size, precision, limits)
            if engine.fallback:
                console.print(f"completions come from transformers' own loop, as {engine.fallback}", markup=False)
            engine = engine.variant(seed=config.evaluation.seed, max_new_tokens=config.rollout.max_new_tokens)
            rollouts = engine.generate(ids, mask, num_rollouts=count, prompt_keys=torch.arange(len(prompts)))
        figures = {}
        if pair.teachers:
            group = Group.of(rollouts, view)._replace(prompt_ids=own[0].to(device), prompt_mask=own[1])
            teachers = [teacher.parts for teacher in pair.teachers]
            compared = compare(pair.student_parts, teachers, group, limits, pair.vocab_size)
            figures = {name: figure._asdict() for name, figure in compared.items()}
        judged = judges(MAIN_SET, pair.tokenizer, prompts.records, rollouts)
    for line in failures(judged):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return Answer(figures, {name: judged_figures(each, count) for name, each in judged.items()})


def _no_sampler(request: Request, teachers: Sequence[Any]) -> str:
    """Why the teacher cannot sample; empty where it can."""
    if request.alone:
        return "there is none: give one by --teacher, or leave it out"
    if len(teachers) > 1:
        return "the run has several teachers: give one by --teacher, or leave it out"
    if teachers[0].parts.elsewhere:
        return "the run's is on a server: give one by --teacher, or leave it out"
    return ""


if __name__ == "__main__":
    sys.exit(main())
