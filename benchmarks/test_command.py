"""Whole runs of the command on a GPU, each in a process of its own.

One of Qwen3's sizes on random models, made here, for the seconds of its phases; and the default recipe on real weights,
which has to teach the student what it teaches it on a CPU. What the runs wrote is kept beside the rows.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.harness import DRY, Row, Timing
from benchmarks.make_models import make_models, prompt_of, word_tokenizer
from distill.models import ModelError, load_tokenizer
from distill.runtime import read_json_lines

ROOT = Path(__file__).parent.parent
P, T, N = (8, 8, 2) if DRY else (256, 512, 16)
STEPS = 2 if DRY else 4
RECIPE = ROOT / "configs" / "default.yaml"
WANTED_REDUCTION = 0.7  # of the held-out reverse KL, by the default recipe
EVALUATED = 8  # rollouts of a held-out prompt: with the recipe's one the reduction is uncertain by 0.03
PHASES = ("rollout", "score", "update")

pytestmark = pytest.mark.cuda


@pytest.fixture
def folder():
    """Where models and runs of gigabytes are, for the time of a test."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def run_command(config: Path, changes: Mapping[str, Any], output: Path) -> tuple[list[dict], dict, float]:
    """Runs the command; returns the lines of its metrics, its summary, and the seconds that the process took."""
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "distill.train", "--config", str(config), *words]
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    subprocess.run(
        [*command, "--training.output_dir", str(output)], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, check=True
    )
    seconds = time.perf_counter() - start
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return read_json_lines(output / "metrics.jsonl"), summary, seconds


def record_run(record, group: str, metrics: list[dict], seconds: float) -> None:
    """Records the phases of all steps but the first, which warms up, and the process, loading included."""
    steps = metrics[1:]
    for phase in PHASES:
        timing = Timing(tuple(step[f"seconds_{phase}"] for step in steps))
        record(Row(group, phase, timing.median, timing.spread))
    whole = Timing(tuple(sum(step[f"seconds_{phase}"] for phase in PHASES) for step in steps))
    tokens = sum(step["completion_tokens"] for step in steps) // len(steps)
    peak = max(step["peak_memory_bytes"] for step in metrics)
    record(Row(group, "ours", whole.median, whole.spread, peak_bytes=peak, tokens=tokens))
    record(Row(group, f"whole command, {len(metrics)} steps", seconds))


def test_qwen3_on_random_models(folder, record, keep):
    student, teacher = make_models(folder)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    (folder / "prompts.txt").write_text(prompt_of(word_tokenizer(), P) + "\n")
    config = {
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "prompts": {"train": str(folder / "prompts.txt")},
        "rollout": {"max_new_tokens": T},
        "training": {"num_rollouts_per_prompt": N, "num_epochs": STEPS, "learning_rate": 1e-5},
        "loss": {"objective": "reverse_kl"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    metrics, summary, seconds = run_command(folder / "run.yaml", {}, folder / "run")
    keep("metrics", metrics)
    keep("summary", summary)
    record_run(record, f"command, Qwen3-0.6B from 4B, (P, T, N) = {(P, T, N)}", metrics, seconds)
    assert [step["completion_tokens"] for step in metrics] == [N * T] * STEPS


def test_default_recipe(folder, record, keep):
    changes = {"evaluation.num_rollouts_per_prompt": EVALUATED}
    if DRY:
        student, teacher = make_models(folder)
        changes |= {"student.model": student, "student.drop_layers": "[]", "teacher.model": teacher}
        changes |= {"prompts.limit": 4, "prompts.eval_limit": 2, "training.max_steps": 2, "rollout.max_new_tokens": 4}
    else:
        model = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["student"]["model"]
        try:
            load_tokenizer(model)
        except ModelError as error:
            keep("skipped", str(error))
            pytest.skip(str(error))
    metrics, summary, seconds = run_command(RECIPE, changes, folder / "run")
    keep("metrics", metrics)
    keep("summary", summary)
    record_run(record, f"command, {RECIPE.relative_to(ROOT)}", metrics, seconds)
    before, after = summary["eval_reverse_kl_before"], summary["eval_reverse_kl_after"]
    said = f"held-out reverse KL {before:.3f} -> {after:.3f} nats a token"
    assert DRY or summary["eval_reverse_kl_reduction"] >= WANTED_REDUCTION, said
