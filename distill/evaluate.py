"""Held-out evaluation: the exact reverse KL on the student's own completions of prompts it never trained on.

`python -m distill.evaluate --student A --teacher B --prompts FILE` compares any two models of one vocabulary.
"""

import argparse
import json
import sys

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from distill.config import Config, ConfigError
from distill.loss import Group, HeadPair, check_sharing
from distill.models import ModelError
from distill.prompts import PromptError, left_pad
from distill.run import choose_device, choose_dtype, load_pair, load_prompt_sets, make_engine
from distill.runtime import MemoryLimitError, MemoryLimits
from distill.training import Figure, compare


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.evaluate",
        description="Exact reverse and forward KL, agreement of the likeliest token, and perplexity of two models on "
        "completions that one of them samples.",
    )
    parser.add_argument("--student", required=True, metavar="MODEL", help="for example outputs/default/final")
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="a model of the same vocabulary")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="any file that prompts.eval takes")
    parser.add_argument("--num-rollouts", type=int, default=4, help="completions of each prompt (4)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest completion (128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (1); figures are at 1")
    parser.add_argument("--sample-from", choices=("student", "teacher"), default="student")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the models' folders ship")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options, console = parser.parse_args(argv), Console()
    try:
        figures = _evaluate_models(options, console)
    except ValidationError as error:
        problem = error.errors()[0]
        print(f"{problem['loc'][-1]}: found {problem['input']!r}: {problem['msg']}", file=sys.stderr)
        return 2
    except (ConfigError, ModelError, PromptError, MemoryLimitError) as error:
        print(error, file=sys.stderr)
        return 2
    table = Table("on completions of the " + options.sample_from, "mean", "95 %", box=None)
    for name, figure in figures.items():
        table.add_row(name.replace("_", " "), f"{figure.mean:.4f}", f"{figure.low:.4f} to {figure.high:.4f}")
    console.print(table)
    if options.json:
        record = vars(options) | {name: figure._asdict() for name, figure in figures.items()}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    return 0


def _evaluate_models(options: argparse.Namespace, console: Console) -> dict[str, Figure]:
    trust = {"trust_remote_code": options.trust_remote_code}
    config = Config(
        student={"model": options.student, **trust},
        teacher={"model": options.teacher, **trust},
        prompts={"train": options.prompts},
        rollout={"max_new_tokens": options.max_new_tokens, "temperature": options.temperature},
        training={"device": options.device, "precision": options.precision, "seed": options.seed},
        evaluation={"num_rollouts_per_prompt": options.num_rollouts},
    )
    device = choose_device(config.training.device)
    pair = load_pair(config, device, choose_dtype(config.training.precision, device))
    prompts = load_prompt_sets(config, pair, console)[0].student
    for model in (pair.student_parts, pair.teachers[0].parts):
        check_sharing(model)
    limits = MemoryLimits(config.training.tokens_per_micro_batch, device=device)
    sampler = pair.student if options.sample_from == "student" else pair.teachers[0].model
    precision = str(pair.student_parts.dtype).removeprefix("torch.")
    engine = make_engine(sampler, config, pair.tokenizer, pair.vocab_size, precision, limits)
    if engine.fallback:
        console.print(f"completions come from transformers' own loop, as {engine.fallback}", markup=False)
    ids, mask = (tensor.to(device) for tensor in left_pad(prompts.token_ids, pair.tokenizer.pad_token_id))
    with console.status(f"{len(prompts)} prompts, {options.num_rollouts} completions of each"):
        rollouts = engine.generate(ids, mask, num_rollouts=options.num_rollouts, prompt_keys=torch.arange(len(prompts)))
        heads = HeadPair(pair.student_parts, pair.teachers[0].parts, 1.0, pair.vocab_size)
        return compare(heads, Group.of(rollouts), limits)


if __name__ == "__main__":
    sys.exit(main())
