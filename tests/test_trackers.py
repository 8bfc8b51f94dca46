"""Experiment trackers: what they wrote of a real run, read back; continued runs; trackers that are missing or fail.

TensorBoard comes with the development packages; what is tested of the others needs them installed (one extra each).
"""

import contextlib
import importlib.util
import json
import math
import os
import sqlite3
import struct
import threading
import time
from pathlib import Path
from signal import SIGTERM

import pytest
import torch
from rich.console import Console
from test_train import SECONDS, events_of, execute, main, metrics_of

from distill.config import load_config
from distill.config.config import known_keys
from distill.run import Run, trackers
from distill.run.progress import Progress
from distill.run.trackers import Trackers
from distill.runtime import read_json_lines

STEPS = [1, 2, 3, 4, 5]


def needs(name: str):
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"pip install 'distill-on-policy[{name}]'")


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(run) -> dict[str, list[tuple[int, float]]]:
    """Every finite number of a run's own logs, under its tracked name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for kind, name in (("train", "metrics"), ("eval", "evaluations")):
        for line in read_json_lines(run / f"{name}.jsonl"):
            for key, value in line.items():
                for i, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
                    if key != "step" and isinstance(number, int | float):
                        tag = f"{kind}/{key}" if i is None else f"{kind}/{key}/{i}"
                        found.setdefault(tag, []).append((line["step"], number))
    return found


def assert_tracked(told: dict[str, list[tuple[int, float]]], run, *, first_stays: bool = False) -> None:
    """Every number of the run's logs was told once, at its step, and no others.

    `first_stays`: of a step that was taken twice the first numbers are kept, and its seconds were others.
    """
    wanted = expected(run)
    assert {"train/loss", "train/reverse_kl_by_position/1", "eval/reverse_kl"} <= set(wanted)
    assert set(told) == set(wanted)
    for tag, points in wanted.items():
        if first_stays and tag.removeprefix("train/") in SECONDS:
            assert [step for step, _ in told[tag]] == STEPS
            continue
        assert told[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], tag


def wait_until(condition) -> None:
    until = time.monotonic() + 600  # on any machine: it hangs
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def trackio_rows() -> list[tuple[str, int, str]]:
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "distill.db") as database:
        return database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id").fetchall()


def trackio_steps() -> set[int]:
    with contextlib.suppress(sqlite3.OperationalError):  # no table yet
        return {step for _, step, _ in trackio_rows()}
    return set()


def interrupted_then_continued(write_config, name: str) -> None:
    """A run that is killed after step 3, its checkpoint being of step 2, and continued; in processes of their own."""
    path = write_config({"training.report_to": [name], "training.save_every": 2})
    for kill_after, expected_status in ((3, 77), (None, 0)):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # threads that this process has computed with are not in its child
            try:
                status = _run(path, kill_after)
            finally:
                os._exit(status if "status" in locals() else 99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected_status


def _run(path, kill_after: int | None) -> int:
    record = Progress.record

    def killing(self, result):
        record(self, result)
        if result.metrics["step"] == kill_after:
            (name,), folder = self.parts.config.training.report_to, self.output.path
            told = folder / "tracking" / f"{name}.json"
            wait_until(lambda: told.exists() and json.loads(told.read_text())[1] >= 2 * 3)
            if name == "trackio":  # gathers in memory what it is told, and is not told again: it has to be written
                wait_until(lambda: kill_after in trackio_steps())
            os._exit(77)

    Progress.record = killing
    return main(["--config", str(path)])


def test_tensorboard_shows_every_number_of_a_run(write_config, tmp_path):
    execute(write_config({"training.report_to": ["tensorboard"], "training.eval_every": 2}))
    assert_tracked(scalars(tmp_path / "run" / "tensorboard"), tmp_path / "run")


def test_trackers_change_no_number(write_config, tmp_path):
    execute(write_config({"training.output_dir": str(tmp_path / "plain")}))
    execute(write_config({"training.report_to": ["tensorboard"]}))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")
    assert not (tmp_path / "plain" / "tracking").exists()


def test_tensorboard_shows_no_step_twice_after_a_kill(write_config, tmp_path):
    interrupted_then_continued(write_config, "tensorboard")
    told = scalars(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in told["train/loss"]] == STEPS
    assert_tracked(told, tmp_path / "run")


@needs("trackio")
def test_trackio_holds_every_number_once_after_a_kill(write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    interrupted_then_continued(write_config, "trackio")
    told: dict[str, list] = {}
    rows = trackio_rows()
    assert len({name for name, _, _ in rows}) == 1
    assert rows[0][0].startswith("run-")
    for _, step, metrics in rows:
        for tag, value in json.loads(metrics).items():
            told.setdefault(tag, []).append((step, value))
    assert_tracked(told, tmp_path / "run", first_stays=True)


@needs("mlflow")
def test_mlflow_holds_every_number_once_after_a_kill(write_config, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    interrupted_then_continued(write_config, "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["loss.objective"] == "reverse_kl"
    assert set(run.data.params) == {".".join(key.split(".")[:2]) for key in known_keys()}  # of sections within one too
    told = {
        tag: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)] for tag in run.data.metrics
    }
    assert_tracked(told, tmp_path / "run", first_stays=True)


@needs("wandb")
def test_wandb_holds_every_number_once_after_a_kill(write_config, tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted_then_continued(write_config, "wandb")
    told: dict[str, list] = {}
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # parts of one run, by its id
    for data in wandb_records(files[-1].read_bytes()):  # it was told everything again
        history = Record.FromString(data).history
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for tag, value in items.items():
            if "/" in tag:
                told.setdefault(tag, []).append((items["_step"], value))
    assert_tracked(told, tmp_path / "run")


def wandb_records(content: bytes):
    """The records of an offline run's log: blocks of 32 KiB, in them parts with a header of CRC, length and type."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no header fits in the rest of the block
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
        elif kind == 0:
            return


def until_the_next_second() -> None:
    """TensorBoard's files are named by the second in which they are begun, and read in the order of their names."""
    now = int(time.time())
    wait_until(lambda: int(time.time()) != now)


def test_a_run_begun_anew_is_another_tracked_run(tmp_path):
    def told(continued, steps):
        with Trackers(["tensorboard"], tmp_path, {}, continued, pytest.fail) as tracked:
            for step in steps:
                tracked.log({"step": step, "loss": float(step)})
        until_the_next_second()
        return scalars(tmp_path / "tensorboard")["train/loss"], json.loads(
            (tmp_path / "tracking" / "tensorboard.json").read_text()
        )

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n')
    (tmp_path / "evaluations.jsonl").touch()
    first, (one, _) = told(False, [1, 2, 3])
    assert first == [(1, 1), (2, 2), (3, 3)]
    second, (same, order) = told(True, [3, 4])  # its logs were cut back to step 2
    assert second == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert (same, order) == (one, 8)
    anew, (other, _) = told(False, [1])
    assert anew == [(1, 1)]
    assert other != one


def test_what_a_tracker_has_not_heard_before_a_kill_it_hears_later(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setitem(trackers.OPENERS, "mlflow", lambda run: (lambda step, f: heard.append((step, f)), heard.append))
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "mlflow.json").write_text('["abc", 2]')
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0}}\n' for step in (1, 2)))
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "kl": 1}\n{"step": 1, "kl": 2}\n')
    with Trackers(["mlflow"], tmp_path, {}, True, pytest.fail):
        pass
    assert heard == [(1, {"eval/kl": 2.0}), (2, {"train/loss": 0.0}), False]


def test_only_finite_numbers_are_told(tmp_path):
    with Trackers(["tensorboard"], tmp_path, {}, False, pytest.fail) as tracked:
        tracked.log({"step": 1, "a": math.nan, "b": None, "c": [None, 2.0, math.inf], "d": True, "e": "text", "f": 3})
    assert scalars(tmp_path / "tensorboard") == {"train/c/1": [(1, 2.0)], "train/d": [(1, 1.0)], "train/f": [(1, 3.0)]}


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_before_models_load(write_config, capsys, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == name else found(wanted))
    path = write_config({"training.report_to": [name], "student.model": "/nowhere"})
    assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert f"training.report_to: {name} is not installed: pip install 'distill-on-policy[{name}]'" in message
    assert "/nowhere" not in message


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(write_config, tmp_path, capfd):
    blocked = tmp_path / "run" / "tensorboard"
    blocked.parent.mkdir()
    blocked.write_text("a file where a folder is to be")
    assert main(["--config", str(write_config({"training.report_to": ["tensorboard"]}))]) == 0
    assert capfd.readouterr().out.count("tensorboard could not be opened: ") == 1
    (event,) = events_of(tmp_path / "run")
    assert event["event"] == "tracker"
    assert len(metrics_of(tmp_path / "run")) == 5


def test_a_failure_on_the_way_is_told_once_and_what_follows_is_tracked(tmp_path, monkeypatch):
    heard, told = [], []

    def opener(run):
        def write(step, figures):
            if step in (2, 3):
                raise ConnectionError("the network is away")
            heard.append(step)

        return write, heard.append

    monkeypatch.setitem(trackers.OPENERS, "tensorboard", opener)
    with Trackers(["tensorboard"], tmp_path, {}, False, told.append) as tracked:
        for step in range(1, 6):
            tracked.log({"step": step, "loss": 0.0})
        tracked.complete = True
    assert heard == [1, 4, 5, True]
    assert told == ["tensorboard fails, and misses what it fails at: ConnectionError: the network is away"]


def test_a_tracker_that_hangs_holds_nobody_up(tmp_path, monkeypatch):
    """What is logged is taken at once, and what is left at the end is waited for once: it never comes to its end."""
    released, told, waits, join = threading.Event(), [], [], threading.Thread.join
    monkeypatch.setitem(trackers.OPENERS, "tensorboard", lambda run: released.wait() and (None, None))
    monkeypatch.setattr(trackers, "SECONDS_TO_FINISH", 0.2)
    monkeypatch.setattr(threading.Thread, "join", lambda self, *limit: waits.append(limit) or join(self, *limit))
    with Trackers(["tensorboard"], tmp_path, {}, False, told.append) as tracked:
        for step in range(1, 1000):
            tracked.log({"step": step, "loss": 0.0})
    (hanging,) = (thread for thread in threading.enumerate() if thread.name == "tensorboard")
    assert hanging.queue.qsize() == 1000  # all steps, and that it was the end
    assert waits == [(0.2,)]
    assert told == ["tensorboard has not taken everything within 0.2 s, and is left behind"]
    released.set()


def test_a_signal_finishes_what_is_tracked(write_config, tmp_path):
    run = Run(
        load_config(write_config({"training.report_to": ["tensorboard"]})),
        Console(file=open(os.devnull, "w")),  # noqa: SIM115
        lambda: SIGTERM if run.parts.trainer.position.step == 2 else None,
    )
    assert run.execute() == 128 + SIGTERM
    assert [step for step, _ in scalars(tmp_path / "run" / "tensorboard")["train/loss"]] == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name == "tensorboard"]
    until_the_next_second()
    execute(write_config({"training.report_to": ["tensorboard"]}))
    assert_tracked(scalars(tmp_path / "run" / "tensorboard"), tmp_path / "run")
