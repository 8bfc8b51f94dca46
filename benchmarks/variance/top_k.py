"""`python -m benchmarks.variance.top_k --config RECIPE [--policy MODEL]`: what is lost with k tokens of a teacher's.

At a fixed policy, over the same rollouts: the gradient of all parameters that each objective gives from k named tokens,
against that of the whole distribution. Sums over prompts are divided by sums over prompts, and intervals are a
jackknife's over prompts.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.variance.fixed import ratio
from benchmarks.variance.tables import Record, fill_page, markdown, write_csv
from distill.config import ConfigError, load_config
from distill.loss import Group
from distill.loss.gradients import token_weights
from distill.models import ModelError
from distill.prompts import PromptError, left_pad
from distill.run import choose_device
from distill.run.parts import RunParts
from distill.training import Ranks
from distill_kernels import TopTokens, linear_distill_loss

OBJECTIVES = ("reverse_kl", "forward_kl", "jsd")
KS = (1, 5, 20, 100)
NUM_ROLLOUTS = 16
UNTRAINED = "untrained"


def figures(parts: RunParts, prompt: int) -> dict[tuple[str, int], Record]:
    """Of one prompt's rollouts, each objective's sums of squares against those of the whole distribution."""
    ids, mask = left_pad([parts.prompts.student.token_ids[prompt]], parts.tokenizer.pad_token_id)
    asked = ids.to(parts.device), mask.to(parts.device)
    rollouts = parts.engine.generate(*asked, num_rollouts=NUM_ROLLOUTS, prompt_keys=torch.tensor([prompt]))
    group, rows = Group.of(rollouts), torch.arange(NUM_ROLLOUTS)
    (teacher,) = parts.teachers
    student, token_ids = parts.student_parts, group.valid(group.completion_ids, rows)
    hidden, weights = student.hidden(*group.inputs(rows)), token_weights(group.completion_lengths, "sequence")
    with torch.no_grad():
        theirs = teacher.hidden(*group.inputs(rows))
        logprobs = teacher.head.logits(theirs)[:, : parts.vocab_size].log_softmax(-1)
    parameters = [p for p in parts.student.parameters() if p.requires_grad]
    common = student.head_arguments("student") | {"vocab_size": parts.vocab_size}

    def gradient(*of_teacher: Tensor | None, **options) -> tuple[float, list[Tensor]]:
        loss, _ = linear_distill_loss(
            hidden, student.head.weight, *of_teacher, token_ids, weights.to(hidden.device), **common, **options
        )
        return float(loss.detach()), list(torch.autograd.grad(loss, parameters, retain_graph=True))

    whole = {
        objective: gradient(theirs, teacher.head.weight, objective=objective, **teacher.head_arguments("teacher"))
        for objective in OBJECTIVES
    }
    found = {}
    for k in KS:
        top = logprobs.topk(k, -1)
        for objective in OBJECTIVES:
            loss, its = gradient(None, None, objective=objective, teacher_top=TopTokens(top.indices, top.values))
            exact_loss, exact = whole[objective]
            found[objective, k] = {
                "loss": loss,
                "exact_loss": exact_loss,
                "distance": _squares((a - b for a, b in zip(its, exact, strict=True))),
                "exact": _squares(exact),
                "own": _squares(its),
                "product": sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(its, exact, strict=True)),
            }
    return found


def _squares(tensors: Iterator[Tensor] | Sequence[Tensor]) -> float:
    return sum(float(tensor.norm().double() ** 2) for tensor in tensors)


def measure(config: Path, policy: str | None, prompts: int, folder: Path, console: Console) -> list[Record]:
    """A record for each objective and k."""
    changes = {"training": {"resume": "never", "output_dir": str(folder)}}
    if policy:
        changes["student"] = {"model": policy, "drop_layers": []}
    recipe = load_config(config, changes)
    parts = RunParts(recipe, choose_device(recipe.training.device), Console(quiet=True), Ranks(), None)
    if len(parts.prompts.student) < prompts:
        raise ConfigError(f"{recipe.prompts.train}: has {len(parts.prompts.student)} prompts of {prompts}")
    all_found = [figures(parts, prompt) for prompt in track(range(prompts), policy or UNTRAINED, console=console)]
    records = []
    for objective, k in all_found[0]:
        rows = [found[objective, k] for found in all_found]
        record: Record = {"policy": policy or UNTRAINED, "objective": f"`{objective}`", "k": k, "prompts": prompts}
        record |= {f"divergence{key}": value for key, value in ratio(rows, "loss", "exact_loss", log=False).items()}
        distance = ratio(rows, "distance", "exact", log=False)
        record |= {f"distance{key}": math.sqrt(max(0, value)) for key, value in distance.items()}
        cosines = [row | {"cosine": row["product"] / math.sqrt(row["own"] * row["exact"]), "one": 1} for row in rows]
        record |= {f"cosine{key}": value for key, value in ratio(cosines, "cosine", "one", log=False).items()}
        records.append(record)
    return records


def table(records: Sequence[Record]) -> str:
    """The records' tables, one a policy."""
    texts = []
    for policy in dict.fromkeys(record["policy"] for record in records):
        rows = [
            [r["objective"], str(r["k"]), *(_cell(r, name) for name in ("divergence", "distance", "cosine"))]
            for r in records
            if r["policy"] == policy
        ]
        header = ["objective", "k", "its value / the exact one", "‖g − g_exact‖ / ‖g_exact‖", "cosine to g_exact"]
        texts.append(f"Student: {policy}.\n\n" + markdown(header, rows))
    return "\n".join(texts)


def _cell(record: Record, name: str) -> str:
    return f"{record[name]:.3f} ({record[f'{name}_low']:.3f} to {record[f'{name}_high']:.3f})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variance.top_k", description=__doc__.split(":")[1])
    parser.add_argument("--config", type=Path, required=True, help="the recipe: an ordinary run's configuration")
    parser.add_argument("--policy", action="append", default=[], help="also this student; repeat for more")
    parser.add_argument("--prompts", type=int, default=10, help="the first so many")
    parser.add_argument("--output", type=Path, default=Path("outputs/variance"))
    parser.add_argument("--page", type=Path, help="a Markdown page whose section top_k the tables go into")
    arguments, console = parser.parse_args(argv), Console()
    try:
        found = [
            record
            for policy in (None, *arguments.policy)
            for record in measure(arguments.config, policy, arguments.prompts, arguments.output / "run", console)
        ]
    except (ConfigError, ModelError, PromptError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.output / "top_k.csv", found)
    (arguments.output / "top_k.md").write_text(table(found), encoding="utf-8")
    if arguments.page:
        fill_page(arguments.page, "top_k", arguments.output, {})
    console.print(table(found), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
