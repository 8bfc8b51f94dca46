"""When a run has had enough: which evaluations count as better, what is refused, and runs that end by it."""

import json
import math
import signal

import pytest
from rich.console import Console
from test_train import events_of, execute, metrics_of

from distill.config import load_config
from distill.run import Judges, Run
from distill.run.early_stopping import REVERSE_KL, Target, best_step, had_enough, target_of
from distill.runtime import read_json_lines
from distill.train import main
from distill.training import Ranks

ACCURACY = Target("good", "main", "good", "pass@1")


def by_kl(*values: float | None) -> list[dict]:
    return [{"step": step, "reverse_kl": value} for step, value in enumerate(values)]


def by_accuracy(*values: float | None) -> list[dict]:
    return [{"step": step, "metrics": {"good": {"pass@1": {"mean": v}}}} for step, v in enumerate(values)]


def enough(evaluations: list[dict], target: Target, patience: int = 2, min_delta: float = 0.0) -> bool:
    return had_enough(evaluations, target, patience=patience, min_delta=min_delta) is not None


@pytest.mark.parametrize(
    ("evaluations", "target", "options", "ends"),
    [
        (by_kl(3, 2, 1), REVERSE_KL, {}, False),
        (by_kl(3, 2, 2.5), REVERSE_KL, {}, False),
        (by_kl(3, 2, 2, 2.5), REVERSE_KL, {}, True),  # as good is no better
        (by_kl(1, 2, 2.5), REVERSE_KL, {}, True),  # the untrained student was the best
        (by_kl(3, 2, 2.5, 1.9, 1.9), REVERSE_KL, {}, False),
        (
            by_kl(3, 2.95, 2.9, 2.85),
            REVERSE_KL,
            {"min_delta": 0.12, "patience": 3},
            False,
        ),  # together, since the best that counted
        (by_kl(3, 2.95, 2.9, 2.95), REVERSE_KL, {"min_delta": 0.12, "patience": 3}, True),
        (by_kl(3, None, math.nan), REVERSE_KL, {}, True),
        (by_kl(None, None, 5), REVERSE_KL, {}, False),
        (by_kl(3), REVERSE_KL, {"patience": 1}, False),
        (by_kl(3, 4), REVERSE_KL, {"patience": 1}, True),
        (by_accuracy(0.1, 0.3, 0.2), ACCURACY, {}, False),
        (by_accuracy(0.1, 0.3, 0.2, 0.3), ACCURACY, {}, True),
        (by_accuracy(0.0, 0.0, 0.0), ACCURACY, {}, True),
        (by_accuracy(0.1, 0.3, 0.1 + 0.2, 0.1 + 0.2), ACCURACY, {}, True),  # which is 0.3 but for rounding
        ([], ACCURACY, {}, False),
    ],
)
def test_patience_counts_evaluations_that_are_no_better(evaluations, target, options, ends):
    assert enough(evaluations, target, **options) == ends
    if ends:  # and not before
        assert not enough(evaluations[:-1], target, **options)


def test_the_best_evaluation_is_one_of_the_trained_student():
    assert best_step(by_kl(1, 3, 2, 2.5), REVERSE_KL) == 2
    assert best_step(by_accuracy(0.9, 0.1, 0.3, 0.3, None), ACCURACY) == 2  # the first of two
    assert best_step(by_kl(1), REVERSE_KL) is None
    assert best_step([{"step": 3, "sets": {"a": {"reverse_kl": 2}}}], Target("a/reverse_kl", "a", None, None)) == 3


@pytest.fixture
def stopping(write_config, tmp_path):
    """Writes the configuration of a run with a metric that nothing satisfies."""
    (tmp_path / "own.py").write_text("def never(record, completion):\n    return 0\n")

    def write(settings: dict, changes: dict | None = None, name: str = "config.yaml"):
        made = {
            "evaluation.metrics": [f"{tmp_path}/own.py:never"],
            "training.eval_every": 1,
            "training.early_stopping": settings,
        }
        return write_config(made | (changes or {}), name)

    return write


# A set with a metric and a number of rollouts of its own.
FAR = {
    "evaluation.num_rollouts_per_prompt": 4,
    "evaluation.sets": {"far": {"prompts": "set.jsonl", "metrics": "contains", "num_rollouts_per_prompt": 2}},
}


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("reverse_kl", REVERSE_KL),
        ("never", Target("never", "main", "never", "avg@4")),
        ("never/pass@2", Target("never/pass@2", "main", "never", "pass@2")),
        ("far/reverse_kl", Target("far/reverse_kl", "far", None, None)),
        ("far/contains", Target("far/contains", "far", "contains", "avg@2")),
        ("far/contains/pass@2", Target("far/contains/pass@2", "far", "contains", "pass@2")),
    ],
)
def test_what_is_to_get_better_is_a_figure_that_evaluations_have(stopping, written, target):
    config = load_config(stopping({"metric": written}, FAR))
    assert target_of(config, Judges.of_run(config, Ranks())) == target


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ({"metric": "nevr"}, {}, "found 'nevr'; did you mean 'never'? There are reverse_kl, never"),
        ({"metric": "never/pass@3"}, {}, "did you mean 'never/pass@"),
        ({"metric": "far/contains/pass@4"}, {}, "did you mean 'far/contains/pass@"),
        ({"metric": "contains"}, {}, "far/contains"),
        ({}, {"training.eval_every": None}, "set training.eval_every"),
        ({}, {"evaluation.metrics": ["nonsense"]}, "evaluation.metrics: nonsense"),
        ({}, {"evaluation.metrics": ["broken.py:f"]}, "broken.py:f: "),
        ({}, {"evaluation.sets": {"main": {"prompts": "a.txt"}}}, "evaluation.sets.main"),
    ],
)
def test_what_cannot_be_is_one_message_before_models_are_loaded(
    stopping, capsys, tmp_path, monkeypatch, settings, changes, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    assert main(["--config", str(stopping(settings, FAR | changes | {"student.model": "/nowhere"}))]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "/nowhere" not in message
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_get_better_ends_as_a_whole_one(stopping, tmp_path):
    run, folder = execute(stopping({"metric": "never", "patience": 2})), tmp_path / "run"
    assert [line["step"] for line in read_json_lines(folder / "evaluations.jsonl")] == [0, 1, 2]
    assert [line["step"] for line in metrics_of(folder)] == [1, 2]
    assert json.loads((folder / "summary.json").read_text())["eval_best_step"] == 1  # the first of two alike
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000001", "step-000002"]
    assert (folder / "final" / "README.md").exists()
    assert run.progress.step == 2
    (event,) = (event for event in events_of(folder) if event["event"] == "early_stopping")
    assert event["step"] == 2
    assert "never has not got better in 2 evaluations" in event["message"]
    # The same command finds it done; with more patience it goes on.
    assert execute(stopping({"metric": "never", "patience": 2})).progress.step == 2
    assert execute(stopping({"metric": "never", "patience": 3})).progress.step == 3


def test_a_run_that_was_stopped_ends_where_it_would_have(stopping, tmp_path):
    settings = {"metric": "never", "patience": 2}
    execute(stopping(settings, {"training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    path, asked = stopping(settings), []

    def signalled():
        asked.append(1)
        return signal.SIGTERM if len(asked) == 2 else None  # after the first step

    assert Run(load_config(path), Console(quiet=True), signalled).execute() == 143
    execute(path)
    whole, continued = (read_json_lines(tmp_path / name / "evaluations.jsonl") for name in ("whole", "run"))
    assert whole == continued
    assert [line["step"] for line in whole] == [0, 1, 2]
