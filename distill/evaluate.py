"""Held-out evaluation: the exact reverse KL on the student's own completions of prompts it never trained on.

`python -m distill.evaluate --student A --teacher B --prompts FILE` compares any two models of one vocabulary.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distill.config import Config, ConfigError
from distill.distributed import Ranks
from distill.group import Group, TeacherView
from distill.head_pair import AGREEMENT_TOKENS, HeadPair
from distill.loading import Pair, choose_device, choose_dtype, load_pair, load_prompt_sets, make_engine
from distill.loss import ModelParts, statistics
from distill.memory import MemoryLimitError, MemoryLimits
from distill.models import ModelError
from distill.prompts import PromptError, left_pad
from distill.rollout import RolloutEngine, Rollouts
from distill_kernels import linear_reverse_kl


@dataclass(frozen=True)
class Evaluation:
    """Figures over all K completion tokens of an evaluation, in nats per token."""

    reverse_kl: float
    standard_error: float
    """Of `reverse_kl`, over prompts, whose tokens are not independent; of a single prompt, over its rollouts."""
    student_entropy: float
    teacher_entropy: float
    completion_tokens: int
    rollouts: Rollouts
    group: Group
    """The same rollouts, with what the teachers saw."""

    def record(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return {name: value for name, value in vars(self).items() if name not in ("rollouts", "group")}


@torch.no_grad()
def evaluate(
    engine: RolloutEngine,
    student: ModelParts,
    teachers: Sequence[ModelParts],
    prompts: tuple[Tensor, Tensor],
    *,
    num_rollouts: int,
    max_new_tokens: int,
    seed: int,
    vocab_size: int,
    limits: MemoryLimits,
    teacher_view: TeacherView | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Samples from the student on the left-padded `prompts` (ids and mask [B, P]) and scores every token exactly.

    The same seed draws with the same random numbers whatever the training run has sampled in between.
    """
    device, ranks = student.head.weight.device, ranks or Ranks()
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in prompts)
    rollouts = ranks.generate(
        engine.variant(seed=seed, max_new_tokens=max_new_tokens),
        prompt_ids,
        prompt_mask,
        num_rollouts=num_rollouts,
        prompt_keys=torch.arange(len(prompt_ids)),
    )
    group = Group.of(rollouts, teacher_view)
    own = ranks.own_rows(group)
    stats = ranks.in_micro_batches(
        limits,
        "evaluation",
        group.for_teachers,
        own,
        lambda parts: statistics(student, teachers, group, parts, vocab_size=vocab_size),
    )
    stats = stats._make(ranks.total(torch.stack(list(stats)), own.repeat_interleave(group.completion_lengths)))
    cluster = _clusters(group).repeat_interleave(group.completion_lengths)
    # Of a teacher on a server, the sampled tokens' own: the same in the mean, with more noise.
    sampled = any(teacher.sampled_only for teacher in teachers)
    reverse_kl = (-stats.reward if sampled else stats.reverse_kl).double()
    mean = reverse_kl.mean()
    residuals = (reverse_kl - mean).cpu()
    return Evaluation(
        reverse_kl=mean.item(),
        standard_error=_clustered_error(residuals, cluster),
        student_entropy=stats.student_entropy.mean().item(),
        teacher_entropy=stats.teacher_entropy.mean().item(),
        completion_tokens=len(cluster),
        rollouts=rollouts,
        group=group,
    )


@torch.no_grad()
def check_against_itself(model: ModelParts, token_ids: Sequence[int], vocab_size: int) -> None:
    """Scores a model against itself on a prompt: every figure must agree. Raises `ModelError`."""
    if model.sampled_only:  # what can be checked of it was, when it was connected
        return
    ids = torch.tensor([token_ids[:64]], device=model.head.weight.device)
    # The prompt's first token stands for a prompt, the rest for its completion.
    ids = ids.repeat(1, 2) if ids.shape[1] == 1 else ids
    length = torch.tensor([ids.shape[1] - 1])
    group = Group(
        ids[:, :1],
        torch.ones(1, 1, dtype=torch.bool),
        ids[:, 1:],
        length,
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, int(length)),
    )
    rows = [torch.zeros(1, dtype=torch.int64)]
    stats = statistics(model, [model], group, rows, vocab_size=vocab_size)
    worst = torch.stack([stats.reverse_kl.abs().max(), stats.reward.abs().max()]).max().item()
    if not worst <= 1e-4:
        raise ModelError(
            f"the teacher scored against itself gives {worst:.3g} nats instead of 0: its weights are damaged"
        )


def _clusters(group: Group) -> Tensor:
    """[R]: the rows that an error takes together, those of a prompt.

    Of a single prompt a figure is about that prompt, and its rollouts are what another draw would change.
    """
    return group.prompt_index if len(group.prompt_ids) > 1 else torch.arange(len(group.completion_lengths))


def _clustered_error(residuals: Tensor, cluster: Tensor) -> float:
    """Standard error of a mean whose terms are independent only between clusters (the ratio estimator's)."""
    count = int(cluster.max()) + 1
    if count < 2:
        return float("nan")
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster, residuals)
    return ((sums.square().sum() * count / (count - 1)).sqrt() / len(residuals)).item()


def decode_samples(tokenizer: Any, rollouts: Rollouts, rows: Sequence[int]) -> list[str]:
    """The text of some rows' completions."""
    return [
        tokenizer.decode(
            rollouts.completion_ids[row, : int(rollouts.completion_lengths[row])], skip_special_tokens=True
        )
        for row in rows
    ]


class Figure(NamedTuple):
    """A mean over tokens with its 95 % interval, which is over clusters of them that are independent."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor, cluster: Tensor) -> "Figure":
        values = values.double().cpu()
        mean = values.mean()
        half = 1.96 * _clustered_error(values - mean, cluster)
        return cls(mean.item(), mean.item() - half, mean.item() + half)

    def exp(self) -> "Figure":
        return Figure(*map(math.exp, self))


@torch.no_grad()
def compare(pair: Pair, group: Group, limits: MemoryLimits) -> dict[str, Figure]:
    """Both exact divergences, the agreement of the likeliest tokens and both perplexities, over a group's tokens."""
    heads = HeadPair(pair.student_parts, pair.teachers[0].parts, 1.0, pair.vocab_size)
    swapped = HeadPair(heads.teacher, heads.student, 1.0, pair.vocab_size)

    def measure(parts: list[Tensor]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for rows in parts:
            inputs, ids = group.inputs(rows), group.valid(group.completion_ids, rows)
            ours, theirs = heads.student.hidden(*inputs), heads.teacher.hidden(*inputs)
            stats = linear_reverse_kl(*heads.inputs(ours, theirs), ids, **heads.options())
            forward = linear_reverse_kl(*swapped.inputs(theirs, ours), ids, **swapped.options())
            tokens = zip(ours.split(AGREEMENT_TOKENS), theirs.split(AGREEMENT_TOKENS), strict=True)
            for name, values in {
                "reverse_kl": stats.reverse_kl,
                "forward_kl": forward.reverse_kl,
                "top_token_agreement": torch.cat([heads.agreement(*both) for both in tokens]),
                "student_perplexity": -stats.student_logprob,
                "teacher_perplexity": -stats.teacher_logprob,
                "cluster": _clusters(group)[rows].repeat_interleave(group.completion_lengths[rows]),
            }.items():
                found.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in found.items()}

    found = limits.in_micro_batches("evaluation", group.lengths, measure)
    cluster = found.pop("cluster")
    figures = {name: Figure.of(values, cluster) for name, values in found.items()}
    return {name: figure.exp() if name.endswith("perplexity") else figure for name, figure in figures.items()}


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
    prompts = load_prompt_sets(config, pair, lambda line: console.print(line, markup=False))[0].student
    limits = MemoryLimits(config.training.tokens_per_micro_batch)
    sampler = pair.student if options.sample_from == "student" else pair.teachers[0].model
    precision = str(pair.student_parts.dtype).removeprefix("torch.")
    engine = make_engine(sampler, config, pair.tokenizer, pair.vocab_size, precision, limits)
    ids, mask = (tensor.to(device) for tensor in left_pad(prompts.token_ids, pair.tokenizer.pad_token_id))
    with console.status(f"{len(prompts)} prompts, {options.num_rollouts} completions of each"):
        rollouts = engine.generate(ids, mask, num_rollouts=options.num_rollouts, prompt_keys=torch.arange(len(prompts)))
        return compare(pair, Group.of(rollouts), limits)


if __name__ == "__main__":
    sys.exit(main())
