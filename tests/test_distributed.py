"""Training over ranks: the same numbers as on one process, ranks that die, hang or are told to stop, other numbers."""

import json
import math
import subprocess
import sys

import pytest
import torch
from test_train import ROOT, environment, weights_of

from distill.distributed import divide
from distill.metrics import read_json_lines

TOLERANCE = 1e-5
# What depends on how rows are cut into micro-batches, and what clocks and the operating system say.
OF_THE_MACHINE = {"top_token_agreement", "tokens_per_second", "peak_memory_bytes"}
# Seven prompts in batches of six, three a step: a step has three prompts, three, or one, so that ranks have two or one
# or none.
SEVEN = "Say red.\nSay green.\nSay a long word.\nSay blue.\nSay grey.\nSay pink and more.\nSay ochre.\n"
UNEVEN = {
    "rollout.prompts_per_batch": 6,
    "training.prompts_per_step": 3,
    "training.num_rollouts_per_prompt": 3,
    "training.num_epochs": 4,
    "training.max_steps": 10,
    "training.learning_rate": 1e-4,
    "training.tokens_per_micro_batch": 64,
}
KINDS = {
    "all weights": {"loss.objective": "reverse_kl"},
    "frozen weights": {
        "student.lora.rank": 4,
        "loss.objective": "sampled_reverse_kl",
        "loss.baseline": "group",
        "loss.reduction": "token",
    },
}


def run_over_ranks(tmp_path, jobs) -> None:
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(ROOT / "tests/over_ranks.py"), str(tmp_path / "jobs.json")]
    result = subprocess.run(command, cwd=ROOT, env=quiet(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def quiet() -> dict[str, str]:
    return environment() | {"OMP_NUM_THREADS": "1"}


def assert_close_runs(one, other) -> None:
    for ours, theirs in zip(*(read_json_lines(run / "metrics.jsonl") for run in (one, other)), strict=True):
        for name in set(ours) - OF_THE_MACHINE:
            if not name.startswith("seconds"):
                values = [math.nan if each is None else each for each in (ours[name], theirs[name])]
                torch.testing.assert_close(*map(torch.tensor, values), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    for ours, theirs in zip(*(read_json_lines(run / "rollouts.jsonl") for run in (one, other)), strict=True):
        assert ours.pop("reverse_kl_exact") == pytest.approx(theirs.pop("reverse_kl_exact"), abs=TOLERANCE)
        assert ours == theirs  # the same tokens, in the same order
    for ours, theirs in zip(*(read_json_lines(run / "evaluations.jsonl") for run in (one, other)), strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
    ours, theirs = weights_of(one), weights_of(other)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_two_and_four_ranks_do_what_one_does(kind, write_config, tmp_path, tiny_pair):
    path = write_config(UNEVEN | KINDS[kind])
    (tmp_path / "prompts.txt").write_text(SEVEN)
    runs = [(1, "replicate"), (2, "replicate"), (4, "replicate")]
    folders = [tmp_path / f"{size}-{parallel}" for size, parallel in runs]
    jobs = [
        [str(path), size, "--training.parallel", parallel, "--training.output_dir", str(folder)]
        for (size, parallel), folder in zip(runs, folders, strict=True)
    ]
    run_over_ranks(tmp_path, jobs)
    for folder in folders[1:]:
        assert_close_runs(folders[0], folder)


def test_prompts_are_divided_by_their_tokens():
    assert divide([5, 1, 1, 1, 2], 2) == [[0], [1, 2, 3, 4]]
    assert divide([1] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert divide([7], 3) == [[0], [], []]
