"""New facts, manners lost and brought back: `python -m benchmarks.recover`, the parts of `configs/recover.yaml`.

A seed's warm start is run once, and from the model that it leaves three things are tried: what the recipe goes on with
(which are its own steps, bit for bit); the same with answers in the place of a quarter of the rollouts; and as many
steps of plain fine-tuning on answers that the original wrote to the same prompts. A run that has its `summary.json` is
not repeated, and one that was stopped goes on. `--page FILE` puts the table between the two markers of a page.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import markdown, summary_of, write
from benchmarks.variance.figures import interval
from distill.config import Config, load_config
from distill.models import eos_ids, load_model, load_tokenizer
from distill.prompts import left_pad, load_prompts
from distill.rollout import SamplingOptions, local_engine
from distill.training import decode_samples

METRIC, FIGURE, SET = "contains", "pass@1", "facts"
BATCH, PER_PROMPT = 16, 2  # prompts sampled at once, and answers to each
Arms = dict[str, list[tuple[float, float]]]  # by arm, each seed's reverse KL and its share of facts


def original_answers(config: Config, path: Path) -> None:
    """Writes what the original answers to the training prompts, long enough to be cut where rollouts are."""
    tokenizer = load_tokenizer(config.teacher.model)
    model = load_model(config.teacher.model, device=torch.device("cpu"))
    prompts = load_prompts(config.prompts.train, tokenizer)
    engine = local_engine(
        model,
        sampling=SamplingOptions(2 * config.rollout.max_new_tokens),
        eos_token_ids=eos_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        seed=config.training.seed,
        vocab_size=len(tokenizer),
        precision="float32",
    )
    records = []
    for first in range(0, len(prompts), BATCH):
        rows = range(first, min(first + BATCH, len(prompts)))
        batch = left_pad([prompts.token_ids[row] for row in rows], tokenizer.pad_token_id)
        rollouts = engine.generate(*batch, num_rollouts=PER_PROMPT, prompt_keys=torch.tensor(rows))
        texts = decode_samples(tokenizer, rollouts, range(len(rollouts.finished)))
        records += [{"prompt": prompts.texts[first + i // PER_PROMPT], "completion": x} for i, x in enumerate(texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def run_all(recipe: Path, seeds: Sequence[int], output: Path) -> Arms:
    """The figures of all arms' runs, which are made where they are not there."""
    config, answers = load_config(recipe), output / "original-answers.jsonl"
    if not answers.exists():
        original_answers(config, answers)
    found: Arms = {}
    for seed in seeds:
        own = ["--training.seed", str(seed)]
        warm = output / f"warm-start-{seed}"
        summary = summary_of(recipe, warm, [*own, "--training.max_steps", "0"])
        found.setdefault("before", []).append(_figures(summary, "before"))
        found.setdefault("after the warm start", []).append(_figures(summary, "after"))
        for arm, words in arms(config, answers).items():
            after = [*own, "--student.model", str(warm / "final"), *words]
            summary = summary_of(recipe, output / f"{arm.replace(' ', '-')}-{seed}", after)
            found.setdefault(arm, []).append(_figures(summary, "after"))
    return found


def arms(config: Config, original: Path) -> dict[str, list[str]]:
    """What each arm changes after the warm start, as words for the command line."""
    training = config.training
    fine_tuning = {
        "epochs": None,
        "steps": training.max_steps,
        "answers_per_step": training.prompts_per_step * training.num_rollouts_per_prompt,
        "learning_rate": training.learning_rate,
    }
    rollouts = {"training.warm_start": "null"}
    answers_too = {"training.off_policy_fraction": "0.25", "training.off_policy_objective": "cross_entropy"}
    plain = {"prompts.answers": str(original), "training.warm_start": json.dumps(fine_tuning)}
    changes = {
        "then on-policy distillation": rollouts | {"prompts.answers": "null"},
        "the same, a quarter of it answers": rollouts | answers_too,
        "then plain fine-tuning": plain | {"training.max_steps": "0"},
    }
    return {arm: [word for key, value in each.items() for word in (f"--{key}", value)] for arm, each in changes.items()}


def _figures(summary: dict[str, Any], when: str) -> tuple[float, float]:
    facts = summary["eval_metrics"][SET][METRIC][FIGURE][when]["mean"]
    return summary[f"eval_reverse_kl_{when}"], facts


def table(found: Arms) -> str:
    """Markdown: a row an arm, means over seeds with 95 % t-intervals."""
    rows = [["", "held-out reverse KL to the original, nats per token", f"{SET}: {METRIC}, {FIGURE}, %"]]
    for arm, figures in found.items():
        kl, facts = interval([kl for kl, _ in figures]), interval([100 * share for _, share in figures])
        rows.append([arm, kl.text(), facts.text("{:.0f}")])
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recover", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/recover.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("outputs/recover-arms"))
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(argv)
    lines = table(run_all(options.config, options.seeds, options.output))
    print(lines)
    if options.page:
        write(options.page, parser.prog, lines)


if __name__ == "__main__":
    main()
