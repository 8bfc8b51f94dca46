"""`make bench-check`: which kept ratios a machine is compared with, and that benchmarks start without a warning."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_train import ROOT, environment

from benchmarks import check, harness

THIS, OTHER = "A CPU, cpu family 6, model 85", "A CPU, cpu family 6, model 143"


@pytest.fixture
def guard(monkeypatch, tmp_path, capsys):
    """Runs the guard on a machine that is `times` as fast as plain PyTorch; returns status and what it said."""
    clock, kept = [0.0], tmp_path / "check.json"

    def taking(seconds: float):
        def call() -> None:
            clock[0] += seconds

        return call

    def run(*words: str, times: float, before: dict | None = None) -> tuple[int, str]:
        if before is not None:
            kept.write_text(json.dumps(before))
        monkeypatch.setattr(check, "pairs", lambda: {"head": (taking(0.25), taking(0.25 * times))})
        status = check.main(list(words))
        said = capsys.readouterr()
        return status, said.out + said.err

    monkeypatch.setattr(check, "KEPT", kept)
    monkeypatch.setattr(check, "cpu_model", lambda: THIS)
    monkeypatch.setattr(check, "time", SimpleNamespace(process_time=lambda: clock[0]))
    monkeypatch.setattr(check.torch, "set_num_threads", lambda _: None)
    return run


@pytest.mark.parametrize(("times", "status"), [(1.5, 1), (1.7, 0), (2.5, 0)])
def test_a_ratio_that_fell_by_more_than_a_fifth_fails(guard, times, status):
    found, said = guard(times=times, before={THIS: {"head": 2.0}, OTHER: {"head": 9.0}})
    assert found == status
    assert f"{times:.2f} x, kept 2.00 x" in said
    assert ("fell by more than 20%: head" in said) == bool(status)


def test_another_cpu_judges_nothing(guard):
    status, said = guard(times=1.5, before={OTHER: {"head": 9.0}})
    assert status == 0
    assert f"check.json has no ratios of this CPU ({THIS}): nothing is compared; --update adds them\n" in said
    assert "1.50 x, none kept" in said


def test_an_update_adds_this_cpu_and_leaves_the_others(guard, tmp_path):
    assert guard("--update", times=2.0, before={OTHER: {"head": 9.0}})[0] == 0
    assert json.loads((tmp_path / "check.json").read_text()) == {OTHER: {"head": 9.0}, THIS: {"head": 2.0}}
    assert guard(times=1.9)[0] == 0
    assert guard(times=1.5)[0] == 1
    assert guard("--update", times=1.5)[0] == 0
    assert json.loads((tmp_path / "check.json").read_text()) == {OTHER: {"head": 9.0}, THIS: {"head": 1.5}}
    assert guard(times=1.5)[0] == 0


def test_two_generations_of_one_name_are_two_models(monkeypatch):
    about = {"model name": "AMD EPYC", "cpu family": "25"}
    names = set()
    for model in ("1", "17"):
        monkeypatch.setattr(harness, "_cpu_info", lambda model=model: about | {"model": model, "stepping": "1"})
        names.add(harness.cpu_model())
        assert harness.describe_machine()["cpu"] == "AMD EPYC"
    assert names == {"AMD EPYC, cpu family 25, model 1", "AMD EPYC, cpu family 25, model 17"}
    monkeypatch.setattr(harness, "_cpu_info", lambda: {"CPU implementer": "0x41", "CPU part": "0xd4f"})
    assert harness.cpu_model().endswith("CPU implementer 0x41, CPU part 0xd4f")


def test_benchmarks_are_imported_without_a_warning():
    """transformers imports torchao, and some of them import transformers before anything of distill."""
    code = "import benchmarks.check, benchmarks.test_growth, benchmarks.test_cells"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
