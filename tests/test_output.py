"""The output folder: full or read-only disks, two runs in one folder, what a kill leaves, what is never overwritten."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import assert_same_run, execute, metrics_of

from distill.config import load_config
from distill.run import OutputError, checkpoint
from distill.run.output import OutputFolder
from distill.runtime import read_json_lines
from distill.train import main


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of its own at tmp_path/disk; skips where this process may not mount."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


@contextlib.contextmanager
def largest_file(size: int):
    """The operating system refuses to let any file grow past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "partial" in path.name or path.suffix == ".tmp"]


CHANGES = {"training.save_every": 1, "training.keep_last": 10, "training.eval_every": 2}


@pytest.mark.parametrize(("kib", "what"), [(12, "could not be written"), (300, "checkpoint"), (1200, "checkpoint")])
def test_a_full_disk_is_one_message_and_loses_nothing(write_config, tmp_path, disk, capsys, kib, what):
    """At the first line, the first checkpoint, a later one. With room made, the same command ends as if never full."""
    execute(write_config({**CHANGES, "training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    folder = disk(f"size={kib}k") / "run"
    path = write_config({**CHANGES, "training.output_dir": str(folder)})
    assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert f"to {folder}" in message
    assert what in message
    assert "MiB are free" in message
    assert "Traceback" not in message
    assert not partials(folder)
    saved = checkpoint.list_checkpoints(folder / "checkpoints")
    for found in saved:
        checkpoint.load(found)
    assert bool(saved) == (kib > 1000)
    if saved:
        assert str(saved[-1]) in message
    subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path / "disk")], check=True)
    assert main(["--config", str(path)]) == 0
    assert_same_run(tmp_path / "whole", folder)


def test_a_file_that_may_not_grow_ends_the_run_like_a_full_disk(write_config, tmp_path, capsys):
    execute(write_config({**CHANGES, "training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    path = write_config(CHANGES)
    assert main(["--config", str(path), "--training.max_steps", "2"]) == 0
    before = metrics_of(tmp_path / "run")
    with largest_file(60_000):
        assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "File too large" in message
    assert "step-000002 is whole" in message
    assert not partials(tmp_path / "run")
    assert metrics_of(tmp_path / "run")[:2] == before
    assert main(["--config", str(path)]) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_a_log_keeps_whole_lines_only_when_the_disk_is_full(tmp_path):
    folder = OutputFolder(tmp_path / "run")
    folder.open_logs(None)
    folder.log("events", [{"step": 1}])
    with largest_file(30), pytest.raises(OutputError, match=r"events\.jsonl could not be written.*File too large"):
        folder.log("events", [{"step": 2}, {"step": 3, "message": "long" * 10}])
    folder.log("events", [{"step": 4}])
    folder.release()
    assert [record["step"] for record in read_json_lines(tmp_path / "run" / "events.jsonl")] == [1, 4]


def test_a_final_model_is_replaced_whole_or_not_at_all(write_config, tmp_path, capsys):
    path = write_config({"training.max_steps": 1})
    execute(path)
    final = {file.name: file.read_bytes() for file in (tmp_path / "run" / "final").iterdir()}
    with largest_file(60_000):
        assert main(["--config", str(path)]) == 2  # nothing left to train, but the model is written anew
    assert "final could not be written" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "run" / "final").iterdir()} == final
    assert not partials(tmp_path / "run")


def test_a_read_only_file_system_is_named_before_anything_is_loaded(write_config, disk, capsys):
    folder = disk("size=1m,ro") / "run"
    path = write_config({"training.output_dir": str(folder), "student.model": "/nowhere"})
    assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert f"to {folder}: Read-only file system" in message
    assert "/nowhere" not in message


def test_a_folder_that_cannot_be_made_is_named(write_config, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for name in ("file", "file/run"):
        path = write_config({"training.output_dir": str(tmp_path / name)})
        assert main(["--config", str(path)]) == 2
        message = capsys.readouterr().err
        assert "training.output_dir: its lock could not be written" in message
        assert str(tmp_path / name) in message
    assert (tmp_path / "file").read_text() == "kept"


HOLD = (
    "import sys; from pathlib import Path; from distill.run.output import OutputFolder;"
    "folder = OutputFolder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def test_a_folder_that_another_run_holds_is_left_alone(write_config, tmp_path, capsys):
    path = write_config({"training.max_steps": 1})
    execute(path)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(["--config", str(path), "--training.resume", "never"]) == 2
        message = capsys.readouterr().err
        assert f"in use by another run (process {other.pid} on " in message
        assert {file: file.read_bytes() for file in before} == before
        other.kill()  # what a killed run leaves behind stands in nobody's way
    assert (tmp_path / "run" / ".lock").exists()
    assert main(["--config", str(path)]) == 0
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_that_never_began_leaves_no_folder(write_config, tmp_path):
    assert main(["--config", str(write_config({"student.model": "/nowhere"}))]) == 2
    assert not (tmp_path / "run").exists()


def test_what_a_kill_left_half_written_is_removed_and_logs_are_cut_back(write_config, tmp_path):
    execute(write_config({**CHANGES, "training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    path = write_config(CHANGES)
    assert main(["--config", str(path), "--training.max_steps", "3"]) == 0
    run = tmp_path / "run"
    for half in (run / "checkpoints" / ".step-000004.partial", run / "final.partial"):
        half.mkdir()
        (half / "student.safetensors").write_bytes(b"half")
    (run / "summary.json.tmp").write_text("{")
    # Lines that were written after the last checkpoint, the last of them not to its end.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "x"}\n{"st')
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 4, "reverse_kl": 1.0}\n')
    execute(path)
    assert not partials(run)
    assert_same_run(tmp_path / "whole", run)


def test_metrics_come_from_the_checkpoint_even_when_the_file_is_lost(write_config, tmp_path):
    execute(write_config({**CHANGES, "training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    path = write_config(CHANGES)
    assert main(["--config", str(path), "--training.max_steps", "3"]) == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "evaluations.jsonl").write_bytes(b"\xff")
    execute(path)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    lines = read_json_lines(tmp_path / "run" / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 5]


def test_a_checkpoint_of_another_folder_is_continued_here(write_config, tmp_path):
    path = write_config(CHANGES)
    execute(path)
    named = tmp_path / "run" / "checkpoints" / "step-000002"
    elsewhere = str(tmp_path / "elsewhere")
    assert main(["--config", str(path), "--training.resume", str(named), "--training.output_dir", elsewhere]) == 0
    assert metrics_of(tmp_path / "elsewhere") == metrics_of(tmp_path / "run")
    assert len(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")) == 5


def test_an_older_checkpoint_is_not_continued_over_newer_ones(write_config, tmp_path, capsys):
    path = write_config(CHANGES)
    execute(path)
    named = tmp_path / "run" / "checkpoints" / "step-000002"
    assert main(["--config", str(path), "--training.resume", str(named)]) == 2
    message = capsys.readouterr().err
    assert f"{named} is older than" in message
    assert "set training.resume to auto" in message.lower().replace("set\n", "set ")
    newest = tmp_path / "run" / "checkpoints" / "step-000005"
    assert main(["--config", str(path), "--training.resume", str(newest)]) == 0


def test_a_damaged_newest_checkpoint_counts_no_more(write_config, tmp_path):
    """It is kept under another name, and the ones that are sound are those that `keep_last` keeps."""
    execute(write_config({**CHANGES, "training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    path = write_config({**CHANGES, "training.eval_every": None})
    assert main(["--config", str(path), "--training.max_steps", "4"]) == 0
    saved = tmp_path / "run" / "checkpoints"
    (saved / "step-000004" / "student.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-000004.*damaged.*trying the checkpoint before it"):
        assert main(["--config", str(path), "--training.keep_last", "1"]) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert sorted(p.name for p in saved.iterdir()) == ["damaged-step-000004", "step-000005"]


def test_no_sound_checkpoint_is_no_reason_to_start_over(write_config, tmp_path, capsys):
    path = write_config({"training.max_steps": 2})
    execute(path)
    logged = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for saved in (tmp_path / "run" / "checkpoints").iterdir():
        (saved / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="trying the checkpoint before it"):
        assert main(["--config", str(path)]) == 2
    assert "none of the 1 checkpoints there is sound" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == logged


def test_a_finished_run_without_checkpoints_is_not_written_over(write_config, tmp_path):
    path = write_config({"training.max_steps": 1})
    execute(path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    execute(path)
    assert (tmp_path / "run.1" / "final").is_dir()
    assert metrics_of(tmp_path / "run.1") == metrics_of(tmp_path / "run")


def test_a_model_that_was_exchanged_is_named(write_config, tmp_path, tiny_pair, capsys):
    student = tmp_path / "student"
    shutil.copytree(tiny_pair["student"], student)
    path = write_config({"training.max_steps": 1, "student.model": str(student)})
    execute(path)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "is of another student: 9 tensors differ" in message or "tensors differ, model.layers.2" in message


def test_another_number_of_threads_is_said(write_config, tmp_path, capsys):
    path = write_config({"training.max_steps": 1})
    execute(path)
    saved = tmp_path / "run" / "checkpoints" / "step-000001"
    state = json.loads((saved / "state.json").read_text())
    state["environment"]["threads"] = 77
    (saved / "state.json").write_text(json.dumps(state))
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["state.json"] = checkpoint._sha256(saved / "state.json")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert main(["--config", str(path)]) == 0
    assert "threads was 77, now" in capsys.readouterr().out


def test_the_configuration_is_written_whole(write_config, tmp_path):
    execute(write_config({"training.max_steps": 1}))
    written = load_config(tmp_path / "run" / "config.yaml")
    path = write_config({"training.max_steps": 2})
    with largest_file(1200):
        assert main(["--config", str(path)]) == 2
    assert load_config(tmp_path / "run" / "config.yaml") == written
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-000001"]
