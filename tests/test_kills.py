"""SIGKILL at any moment: what is on disk afterwards continues to the same weights, bit for bit."""

import json
import subprocess
import sys

import psutil
import pytest
from test_train import ROOT, assert_same_run, environment

from distill.runtime import read_json_lines

KILLS = 44


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_forty_times_ends_with_the_same_weights(write_config, tmp_path, seed):
    """Two prompts a batch, so that rollouts are in hand at half of the checkpoints, with rewards; a save a step. The
    first steps are a warm start, and in the others a third of the sequences are written answers.
    """
    records = [{"prompt": f"Say {word}.", "completion": word} for word in ("red", "green", "blue", "grey", "pink")]
    (tmp_path / "answered.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "reward.py").write_text("def short(record, completion):\n    return -0.1 * len(completion)\n")
    changes = {
        "rewards": [{"function": f"{tmp_path / 'reward.py'}:short"}],
        "prompts.train": str(tmp_path / "answered.jsonl"),
        "training.warm_start": {"steps": 40, "answers_per_step": 2},
        "training.num_rollouts_per_prompt": 3,
        "training.off_policy_fraction": 0.34,
        "training.num_epochs": 16,
        "training.save_every": 1,
        "training.eval_every": 5,
        "training.output_dir": str(tmp_path / "whole"),
    }
    one_thread = environment() | {"OMP_NUM_THREADS": "1"}
    whole = write_config(changes, "whole.yaml")
    killed = write_config(changes | {"training.output_dir": str(tmp_path / "killed")}, "killed.yaml")
    command = [sys.executable, "tests/killing.py", str(whole), "0", "0"]
    subprocess.run(command, cwd=ROOT, env=one_thread, check=True, capture_output=True)
    command = [sys.executable, "tests/killing.py", str(killed), str(KILLS), str(seed)]
    result = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    kills = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"kind"')]
    assert len(kills) == KILLS
    assert sum(bool(kill["left"]) for kill in kills) >= 10, "too few kills in the midst of a save"
    assert len({kill["step"] for kill in kills}) >= 15, "the kills are not spread over the run"
    assert sum(kill["step"] < 40 for kill in kills) >= 5, "too few kills in the warm start"
    assert sum(kill["step"] > 40 for kill in kills) >= 5, "too few kills after the warm start"
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    for log in ("evaluations.jsonl", "tokens.jsonl"):
        one, other = (read_json_lines(tmp_path / name / log) for name in ("whole", "killed"))
        assert one == other, log
    assert not [path for path in (tmp_path / "killed").rglob("*") if "partial" in path.name or path.suffix == ".tmp"]
    assert not (tmp_path / "killed" / ".lock").exists()
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(each.info["cmdline"])]
