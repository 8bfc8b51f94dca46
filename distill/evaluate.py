"""Held-out evaluation: the exact reverse KL on the student's own completions of prompts it never trained on.

`python -m distill.evaluate --student A --teacher B --prompts FILE` compares any two models of one vocabulary;
`python -m distill.evaluate --run RUN` a run's trained model and its teachers, each with the prompts that it saw there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from distill.config import Config, ConfigError, load_config
from distill.loss import Group, check_sharing
from distill.models import ModelError
from distill.prompts import PromptError, left_pad
from distill.run import choose_device, choose_dtype, load_pair, load_prompt_sets, make_engine
from distill.runtime import MemoryLimitError, MemoryLimits
from distill.servers import ServerError
from distill.training import Figure, compare


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 for what the user can mend."""
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
    parser.add_argument("--student", metavar="MODEL", help="for example outputs/default/final")
    parser.add_argument("--teacher", metavar="MODEL", help="a model of the same vocabulary")
    parser.add_argument("--prompts", metavar="FILE", help="any file that prompts.eval takes")
    parser.add_argument("--num-rollouts", type=int, help="completions of each prompt (4)")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion (128)")
    parser.add_argument("--temperature", type=float, help="of the sampling (1); figures are at 1")
    parser.add_argument("--sample-from", choices=("student", "teacher"), default="student")
    parser.add_argument("--seed", type=int, help="of the sampling (1234)")
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the models' folders ship")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options, console = parser.parse_args(argv), Console()
    try:
        config = _configuration(options)
        figures = _evaluate_models(config, options.sample_from, console)
    except ValidationError as error:
        problem = error.errors()[0]
        print(f"{problem['loc'][-1]}: found {problem['input']!r}: {problem['msg']}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"{error}; or give --teacher MODEL", file=sys.stderr)
        return 2
    except (ConfigError, ModelError, PromptError, MemoryLimitError) as error:
        print(error, file=sys.stderr)
        return 2
    table = Table("on completions of the " + options.sample_from, "mean", "95 %", box=None)
    for name, figure in figures.items():
        table.add_row(name.replace("_", " "), f"{figure.mean:.4f}", f"{figure.low:.4f} to {figure.high:.4f}")
    console.print(table)
    if options.json:
        asked = {
            "num_rollouts": config.evaluation.num_rollouts_per_prompt,
            "max_new_tokens": config.rollout.max_new_tokens,
            "temperature": config.rollout.temperature,
            "seed": config.evaluation.seed,
        }
        record = vars(options) | asked | {name: figure._asdict() for name, figure in figures.items()}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    return 0


def _configuration(options: argparse.Namespace) -> Config:
    """The configuration of what is compared: a run's, or one of its own. Raises `ConfigError`."""
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
        return _of_run(Path(options.run), sections)
    if absent := [f"--{name}" for name in ("student", "teacher", "prompts") if not getattr(options, name)]:
        raise ConfigError(f"{', '.join(absent)}: missing; give them, or --run with the folder of a run")
    sections["evaluation"].setdefault("num_rollouts_per_prompt", 4)
    return Config(**sections)


def _of_run(run: Path, sections: dict[str, dict[str, Any]]) -> Config:
    """A run's configuration with what is given over it: its trained model, and the teachers of its first step."""
    config = load_config(run / "config.yaml")
    if not (run / "final").is_dir() and "model" not in sections["student"]:
        raise ConfigError(f"{run}: a run's folder without final/, which is written at the run's end")
    prompts = config.prompts
    held_out, limit = (prompts.eval, prompts.eval_limit) if prompts.eval else (prompts.train, prompts.limit)
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
        "prompts": {"train": str(held_out), "eval": None, "limit": limit, **sections["prompts"]},
        "rollout": {
            "engine": "auto",
            "server": None,
            "async_batches": 0,
            "max_new_tokens": config.evaluation.max_new_tokens or config.rollout.max_new_tokens,
            **sections["rollout"],
        },
        "training": {"eval_every": None, "parallel": "replicate", **sections["training"]},
        "evaluation": sections["evaluation"],
    }
    if "model" in sections["teacher"]:
        over["teacher"]["server"] = None
    return load_config(run / "config.yaml", over)


def _evaluate_models(config: Config, sample_from: str, console: Console) -> dict[str, Figure]:
    device = choose_device(config.training.device)
    pair = load_pair(config, device, choose_dtype(config.training.precision, device))
    found = load_prompt_sets(config, pair, console)[0]
    prompts, seen = found.student, found.teacher
    for line in found.remarks:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if sample_from == "teacher" and len(pair.teachers) > 1:
        raise ConfigError("--sample-from teacher: the run has several teachers: give one by --teacher, or leave it out")
    if sample_from == "teacher" and pair.teachers[0].parts.elsewhere:
        raise ConfigError("--sample-from teacher: the run's is on a server: give one by --teacher, or leave it out")
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
        group = Group.of(rollouts, view)._replace(prompt_ids=own[0].to(device), prompt_mask=own[1])
        return compare(pair.student_parts, [t.parts for t in pair.teachers], group, limits, pair.vocab_size)


if __name__ == "__main__":
    sys.exit(main())
