"""`benchmarks/gpu.sh`: every part runs at toy sizes on a CPU; what is missing is named; a failure stops nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ["tests", "kernels", "rollout", "step", "train"]
MORE = ["attention", "compiled", "trl"]


@pytest.fixture
def script(tmp_path):
    """Runs the script with an interpreter, or with a shell line in one's place; its output goes to `tmp_path`/out."""

    def run(*words: str, line: str = f'exec {sys.executable} "$@"') -> subprocess.CompletedProcess:
        interpreter = tmp_path / "interpreter"
        interpreter.write_text(f"#!/bin/sh\n{line}\n")
        interpreter.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"PYTHON": str(interpreter), "OMP_NUM_THREADS": "1"}
        command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry", str(tmp_path / "out"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("parts", [PARTS[:3], PARTS[3:], MORE], ids=",".join)
def test_a_dry_run_of_every_part(script, tmp_path, parts):
    done = script(*parts)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in parts:
        assert f"{part}: passed" in done.stdout
        written = tmp_path / "out" / f"{part}.json"
        if part == "tests":
            assert "<testsuite" in written.with_suffix(".xml").read_text()
        else:
            found = json.loads(written.read_text())
            assert "ours" in {row["name"] for row in found["rows"]}
            assert found["command"].startswith("pytest benchmarks/test_")
        if part in ("step", "train"):
            assert len(found["metrics"]) == found["summary"]["steps"]


def test_a_part_that_fails_stops_no_other(script):
    done = script(line='case "$*" in *test_kernels.py*) exit 3 ;; esac')
    assert done.returncode == 1
    said = [line for line in done.stdout.splitlines() if ": passed" in line or ": failed" in line]
    assert [line.split(":")[0] for line in said] == PARTS
    assert [line.split(":")[0] for line in said if "failed (exit 3)" in line] == ["kernels"]


def test_missing_packages_are_named_before_anything_runs(script, tmp_path):
    done = script(line=f'exec {sys.executable} -S "$@"')
    assert done.returncode == 1
    assert "not installed: accelerate, bokeh, gguf, Jinja2, pydantic" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_part_that_there_is_not(script):
    done = script("kernel")
    assert done.returncode == 2
    assert "there is no part kernel" in done.stderr
