"""The warm start on written answers, and groups that mix answers with rollouts."""

import json

import pytest
from test_train import execute, metrics_of, weights_of

ANSWERED = [
    {"prompt": "Say red.", "completion": "red"},
    {"prompt": "Say green.", "completion": "grn"},
    {"prompt": "Say blue.", "completion": "a longer blue"},
    {"prompt": "Say pink.", "completion": "p"},
    {"prompt": "Say nothing."},
]


@pytest.fixture
def answered(tmp_path):
    path = tmp_path / "answered.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in ANSWERED))
    return str(path)


def test_first(write_config, answered, tmp_path, capsys):
    config = write_config({"prompts.train": answered, "training.warm_start": {"epochs": 2, "answers_per_step": 3}, "training.off_policy_fraction": 0.5, "training.prompts_per_step": 2})
    execute(config)
    for line in metrics_of(tmp_path / "run"):
        print(line)
    print((tmp_path / "run" / "evaluations.jsonl").read_text())
    print(capsys.readouterr().out)
    assert 0
