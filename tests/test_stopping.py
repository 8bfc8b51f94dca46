"""Stopping and continuing: to the same numbers, after signals, and what is refused because it would not be the same."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic_core import to_jsonable_python
from rich.console import Console
from test_train import ROOT, assert_same_run, environment, execute, metrics_of

from distill.config import Config, load_config
from distill.config.config import known_keys
from distill.run import Run
from distill.run.checkpoint import HARMLESS, LENGTH, changed_keys
from distill.runtime import read_json_lines
from distill.train import main
from distill.training.evaluation import Evaluation


@pytest.mark.parametrize("stop_at", [1, 2, 3])  # within a batch of two prompts, and between two batches
def test_a_run_that_was_stopped_continues_to_the_same_numbers(write_config, tmp_path, stop_at):
    whole = write_config({"training.output_dir": str(tmp_path / "whole"), "training.eval_every": 2}, "whole.yaml")
    execute(whole)
    path = write_config({"training.save_every": 1, "training.eval_every": 2})
    steps = []
    run = Run(load_config(path), Console(quiet=True), lambda: steps.append(1) or stop_after(steps, stop_at))
    assert run.execute() == 143
    execute(path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    one, other = (read_json_lines(tmp_path / name / "evaluations.jsonl") for name in ("whole", "run"))
    assert one == other
    one, other = (evaluated(tmp_path / name) for name in ("whole", "run"))
    assert one == other
    assert one["eval_reverse_kl_change_standard_error"] > 0


def evaluated(run: Path) -> dict[str, float | None]:
    """What a run's summary says of its evaluations."""
    summary = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key.startswith("eval_")}


def test_a_run_begun_by_an_older_version_has_a_change_without_an_interval(write_config, tmp_path, monkeypatch):
    """Its first evaluation holds nothing to compare by."""
    path = write_config({"training.max_steps": 2})
    record = Evaluation.record
    with monkeypatch.context() as older:
        older.setattr(Evaluation, "record", lambda *args: {k: v for k, v in record(*args).items() if k != "clusters"})
        older.setattr("distill.run.held_out.change_since", lambda first, last: UNKNOWN)
        steps = []
        assert Run(load_config(path), Console(quiet=True), lambda: steps.append(1) or stop_after(steps, 1)).execute()
    run = execute(path)
    first, last = run.progress.evaluations
    assert "clusters" not in first
    assert "clusters" in last
    found = evaluated(tmp_path / "run")
    assert found["eval_reverse_kl_change"] == last["reverse_kl"] - first["reverse_kl"]
    assert found["eval_reverse_kl_change_standard_error"] is last["reverse_kl_change_standard_error"] is None
    assert "compared with itself" not in (tmp_path / "run" / "report.html").read_text()


UNKNOWN = {"reverse_kl_change": None, "reverse_kl_change_standard_error": None}


def stop_after(steps: list[int], count: int):
    return signal.SIGTERM if len(steps) == count else None


def test_what_would_not_continue_truly_is_named(write_config, tmp_path, capsys):
    path = write_config({"training.max_steps": 2})
    execute(path)
    assert main(["--config", str(path), "--training.seed", "5", "--loss.reduction", "token"]) == 2
    message = capsys.readouterr().err
    assert "training.seed: was 0, now 5" in message
    assert "loss.reduction: was 'sequence', now 'token'" in message
    assert "training.resume" in message
    before = metrics_of(tmp_path / "run")
    assert main(["--config", str(path), "--training.max_steps", "4"]) == 0  # harmless, and continues
    assert metrics_of(tmp_path / "run")[:2] == before
    assert len(metrics_of(tmp_path / "run")) == 4
    (tmp_path / "prompts.txt").write_text("Something else.\n")
    assert main(["--config", str(path), "--training.max_steps", "4"]) == 2
    assert "prompts.train" in capsys.readouterr().err


def test_starting_over_keeps_the_earlier_run(write_config, tmp_path):
    path = write_config({"training.max_steps": 1})
    execute(path)
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    execute(write_config({"training.max_steps": 2, "training.resume": "never"}))
    assert (tmp_path / "run.1" / "metrics.jsonl").read_text() == kept
    assert len(metrics_of(tmp_path / "run")) == 2


HANGS = 600  # seconds after which a process that should have come to its end is given up, on any machine


def after_two_steps(config: Path, folder: Path) -> tuple[subprocess.Popen, Path]:
    """The command at work, with two lines in its metrics, and their file."""
    command = [sys.executable, "-m", "distill.train", "--config", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + HANGS
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, metrics


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_continues(write_config, tmp_path, number, status):
    path = write_config({"training.num_epochs": 1000, "prompts.eval": None})
    process, metrics = after_two_steps(path, tmp_path / "run")
    process.send_signal(number)
    output = process.communicate(timeout=HANGS)[0].decode()
    assert process.returncode == status, output
    done = len(read_json_lines(metrics))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert "Traceback" not in output


def test_a_signal_while_the_models_are_loaded_is_no_step(write_config, tmp_path):
    whole = write_config({"training.output_dir": str(tmp_path / "whole")}, "whole.yaml")
    execute(whole)
    path = write_config()
    run = Run(load_config(path), Console(quiet=True), lambda: signal.SIGTERM)
    assert run.execute() == 143
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl") == []
    execute(path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    lines = [read_json_lines(tmp_path / name / "evaluations.jsonl") for name in ("whole", "run")]
    assert lines[0] == lines[1]


def test_a_signal_at_the_last_step_lets_the_run_end(write_config, tmp_path):
    path = write_config({"training.max_steps": 1})
    run = Run(
        load_config(path), Console(quiet=True), lambda: signal.SIGTERM if run.parts.trainer.position.step else None
    )
    assert run.execute() == 0
    assert (tmp_path / "run" / "final").is_dir()


def test_a_second_interrupt_stops_at_once_and_what_was_saved_continues(write_config, tmp_path):
    """The evaluation at the end of the step would take long: the second SIGINT does not wait for it."""
    changes = {"training.save_every": 1, "training.eval_every": 2, "evaluation.num_rollouts_per_prompt": 20_000}
    path = write_config({**changes, "training.num_epochs": 100})
    process, _ = after_two_steps(path, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    said = b""
    while b"Ctrl-C stops at once" not in said:  # only then does the second one count as such
        line = process.stdout.readline()
        assert line, said.decode()
        said += line
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=HANGS)[0].decode()
    assert process.returncode == -signal.SIGINT, output
    assert [line["step"] for line in read_json_lines(tmp_path / "run" / "evaluations.jsonl")] == [0]
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000001"]


SECTION_AND_KEY = {".".join(key.split(".")[:2]) for key in known_keys()}  # of student.lora.rank the first two


@pytest.mark.parametrize("key", sorted(SECTION_AND_KEY - HARMLESS - LENGTH))
def test_each_key_that_matters_is_named_alone(write_config, key):
    config = load_config(write_config()).model_dump(mode="json")
    *section, name = key.split(".")  # `rewards` is in none
    saved = json.loads(json.dumps(config))
    before, now = (content[section[0]] if section else content for content in (saved, config))
    before[name] = "something else"
    assert changed_keys(saved, config) == [f"{key}: was 'something else', now {now[name]!r}"]
    # A checkpoint from before the key existed did what the default does.
    field = (Config.model_fields[section[0]].annotation if section else Config).model_fields[name]
    if not field.is_required():
        del before[name]
        now[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        assert changed_keys(saved, config) == []


@pytest.mark.parametrize("key", sorted(HARMLESS | LENGTH))
def test_each_harmless_key_passes(write_config, key):
    config = load_config(write_config()).model_dump(mode="json")
    section, name = key.split(".")
    saved = json.loads(json.dumps(config))
    saved[section][name] = "something else"
    assert changed_keys(saved, config) == []


def test_a_signal_is_remembered_and_the_second_interrupt_stops_at_once(write_config, tmp_path):
    code = (
        "import os, signal, time; from distill.train import SignalWatch; watch = SignalWatch();"
        "os.kill(os.getpid(), signal.SIGINT); print(watch.received.name, flush=True);"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(600)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.stdout.strip() == "SIGINT"
    assert result.returncode == -signal.SIGINT
