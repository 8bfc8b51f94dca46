"""Numbers that go wrong: steps that are skipped, runs that stop because of them, jumping gradients, cut completions."""

import math

import pytest
import torch
from rich.console import Console
from test_train import assert_same_run, events_of, execute, metrics_of

from distill.config import RolloutConfig, load_config
from distill.run import Run, checkpoint
from distill.run.health import CUT_WINDOW, ENOUGH, GradientWatch, LengthWatch, suspects
from distill.runtime import read_json_lines
from distill.train import main

SAVING = {"training.save_every": 1, "training.keep_last": 99, "prompts.eval": None, "prompts.shuffle": False}


def tensors_of(folder, step: int) -> dict[str, torch.Tensor]:
    found = checkpoint.load(folder / "checkpoints" / f"step-{step:06d}")
    tensors = {name: torch.full(shape, torch.nan) for name, shape in found.shapes.items()}
    found.read(tensors)
    return tensors


def assert_same_state(folder, one: int, other: int) -> None:
    ours, theirs = tensors_of(folder, one), tensors_of(folder, other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_step_without_a_finite_loss_is_skipped_counted_and_named(write_config, tmp_path, capsys, poisoned):
    path = write_config({**SAVING, "teacher.model": poisoned("k"), "training.num_epochs": 2})
    assert main(["--config", str(path)]) == 0
    lines = metrics_of(tmp_path / "run")
    bad = [line["step"] for line in lines if line["loss"] is None]
    assert {5, 10} <= set(bad) < set(range(1, 11))  # `Say pink.` stands fifth in each epoch
    for line in lines:
        assert line["skipped_steps"] == sum(step <= line["step"] for step in bad)
        assert (line["grad_norm"] is None) == (line["step"] in bad)
    assert_same_state(tmp_path / "run", 4, 5)
    changed = tensors_of(tmp_path / "run", 3)
    assert any(not torch.equal(value, tensors_of(tmp_path / "run", 4)[name]) for name, value in changed.items())
    assert all(value.isfinite().all() for value in tensors_of(tmp_path / "run", 10).values())
    text = capsys.readouterr().out.replace("\n", " ")
    assert "step 5 skipped: loss nan, gradient norm nan; prompts: 'Say pink.'" in text
    events = [e for e in events_of(tmp_path / "run") if e["step"] == 5]
    assert [event["event"] for event in events] == ["skipped"]
    assert "'Say pink.'" in events[0]["message"]


def test_too_many_in_a_row_stop_the_run_with_the_last_good_weights(write_config, tmp_path, capsys, poisoned):
    path = write_config({**SAVING, "teacher.model": poisoned("gbk")})
    assert main(["--config", str(path), "--training.max_bad_steps", "1"]) == 1  # after red: green, blue
    message = capsys.readouterr().err
    assert "2 steps in a row had no finite loss and gradient (training.max_bad_steps: 1)" in message
    assert "prompts: 'Say blue.'. The weights of step 1, the last good one" in message
    assert "Traceback" not in message
    assert_same_state(tmp_path / "run", 1, 3)
    # Stopping again at each further one is what the same command does; a larger limit lets the run end.
    assert main(["--config", str(path), "--training.max_bad_steps", "1"]) == 1
    assert main(["--config", str(path), "--training.max_bad_steps", "9"]) == 0
    execute(
        write_config(
            {**SAVING, "teacher.model": str(tmp_path / "poisoned"), "training.output_dir": str(tmp_path / "whole")}
        )
    )
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinite_gradient_of_a_finite_loss_is_skipped(write_config, tmp_path, value):
    run = Run(load_config(write_config(SAVING)), Console(quiet=True), lambda: None)
    embedding = run.parts.student.get_input_embeddings().weight
    embedding.register_hook(lambda grad: torch.full_like(grad, value) if run.parts.trainer.position.step == 2 else grad)
    assert run.execute() == 0
    (bad,) = [line for line in metrics_of(tmp_path / "run") if line["grad_norm"] is None]
    assert bad["step"] == 3
    assert math.isfinite(bad["loss"])
    assert_same_state(tmp_path / "run", 2, 3)


def test_a_gradient_that_jumps_is_reported(write_config, tmp_path):
    path = write_config({"prompts.eval": None, "training.num_epochs": 5, "prompts.shuffle": False})
    run = Run(load_config(path), Console(quiet=True), lambda: None)
    for parameter in run.parts.student.parameters():
        parameter.register_hook(lambda grad: grad * (1000 if run.parts.trainer.position.step == 16 else 1))
    assert run.execute() == 0
    (event,) = events_of(tmp_path / "run")
    assert (event["step"], event["event"]) == (17, "gradient_spike")
    assert "times the median; prompts: 'Say green.'" in event["message"]


def test_the_median_of_the_last_norms_is_what_a_jump_is_measured_by():
    watch = GradientWatch([None, math.nan] + [1.0] * (ENOUGH - 1))
    assert watch.spike(50.0) is None  # too few to compare with
    assert watch.spike(50.0) == 1.0  # the first one did not move the median
    assert watch.spike(10.0) is None
    assert watch.spike(math.inf) is None  # that is a skipped step
    assert watch.spike(math.nan) is None
    for _ in range(60):
        watch.spike(50.0)
    assert watch.spike(90.0) is None  # what has become usual is no jump


def step_of(fraction: float, rollouts: int = 4) -> dict:
    return {"truncated_fraction": fraction, "completion_tokens": 6 * rollouts, "completion_length": 6.0}


def said_at(fractions, *, rollouts=(4,) * 30, **options) -> dict[int, str]:
    """What a watch says, by the step."""
    watch = LengthWatch(RolloutConfig(max_new_tokens=32, **options))
    steps = [step_of(fraction, count) for fraction, count in zip(fractions, rollouts, strict=False)]
    told = [watch.complaint(step, last=step is steps[-1]) for step in steps]
    return {at: text for at, text in enumerate(told, 1) if text}


def test_completions_that_are_cut_are_told_of_once():
    told = said_at([0.0] * 6 + [1.0] * 24)
    assert list(told) == [12]  # six of ten steps
    assert told[12].startswith("60% of the completions of the last 10 steps were cut at rollout.max_new_tokens (32): ")
    assert "the student is seldom taught to end. Raise it" in told[12]
    assert said_at([0.5] * 30) == {}
    assert list(said_at([0.4, 0.7] * 5)) == [10]
    # Of a short run, at its end.
    assert said_at([1.0] * 4)[4].startswith("100% of the completions of all steps")
    assert said_at([0.0, 1.0]) == {}
    # Half of the steps, with few rollouts each.
    assert said_at([0.4, 0.9] * 5, rollouts=(20, 2) * 5) == {}
    masked = said_at([1.0] * 10, mask_truncated=True)[10]
    assert "rollout.mask_truncated leaves them out of the loss" in masked


def test_a_watch_that_is_made_anew_goes_on():
    options, steps = RolloutConfig(max_new_tokens=32), [step_of(1.0)] * CUT_WINDOW
    assert LengthWatch(options, steps[:-1]).complaint(steps[-1], last=False)
    assert LengthWatch(options, steps[:-2]).complaint(steps[-1], last=False) is None
    assert LengthWatch(options, steps, said=True).complaint(steps[-1], last=True) is None


def test_a_run_says_once_that_its_completions_are_cut_and_not_again_when_it_goes_on(write_config, tmp_path, capsys):
    changes = {"prompts.eval": None, "training.num_epochs": 4, "rollout.max_new_tokens": 2, "training.save_every": 1}
    for steps in (4, 12, 20):  # short, ..., through all steps
        path = write_config({**changes, "training.output_dir": str(tmp_path / "parts"), "training.max_steps": steps})
        assert main(["--config", str(path)]) == 0
    execute(write_config(changes))
    said = [read_json_lines(tmp_path / name / "events.jsonl") for name in ("run", "parts")]
    assert [[(e["event"], e["step"]) for e in events] for events in said] == [[("truncated", 10)], [("truncated", 4)]]
    assert capsys.readouterr().out.count("were cut at rollout.max_new_tokens (2)") == 1


def test_suspects_are_the_prompts_with_bad_rows():
    assert suspects(["a", "b"], [(0, 1.0), (0, 2.0), (1, math.nan), (1, 1.0)]) == "'b'"
    assert suspects(["a", "b"], [(0, None), (1, 3.0), (1, 1.0)]) == "'a'"  # of which one row was left out
    assert suspects(["a", "b"], [(0, 1.0), (1, 3.0)]) == "'a', 'b'"
