import json, pytest
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


@pytest.mark.parametrize("steps", [0, 3])
def test_first(write_config, answered, tmp_path, capsys, steps):
    config = write_config(
        {
            "prompts.train": answered,
            "training.max_steps": steps,
            "training.warm_start": {"epochs": 2, "answers_per_step": 3},
            "training.off_policy_fraction": 0.5,
            "training.prompts_per_step": 2,
        }
    )
    execute(config)
    print((tmp_path / "run" / "summary.json").read_text())
    print((tmp_path / "run" / "final/README.md").read_text())
    import re

    print(re.findall(r"<h2>.*</h2>", (tmp_path / "run" / "report.html").read_text()))
    print(capsys.readouterr().out)
    assert 0
