"""`python -m benchmarks.profile`: what it writes about a step, and how kernels are given to ranges."""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from test_train import ROOT, environment
from torch.autograd import DeviceType

from benchmarks import profile
from benchmarks.plan.machines import CPU, Machine
from benchmarks.plan.model import predict
from benchmarks.trace import MARK, Interval, intervals, summary

PHASES = ["rollout", "score", "update", profile.DECODE_STEP]


class Event(NamedTuple):
    """As the profiler hands it out."""

    what: str
    start: int
    duration: int
    where: DeviceType = DeviceType.CUDA
    annotation: bool = False
    thread: int = 1

    def name(self) -> str:
        return self.what

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.duration

    def device_type(self) -> DeviceType:
        return self.where

    def is_user_annotation(self) -> bool:
        return self.annotation

    def start_thread_id(self) -> int:
        return self.thread


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "new" / "profile.json"
    sizes = ["--P", "10", "--T", "7", "--N", "3", "--prompts", "2", "--profiled-tokens", "5"]
    assert profile.main(["--shape", "tiny", "--device", "cpu", *sizes, "--out", str(path)]) == 0
    return json.loads(path.read_text())


def test_each_phase_has_its_operations_and_its_gaps(written):
    assert list(written["phases"]) == PHASES
    for phase in written["phases"].values():
        longest, gaps = phase["longest"], phase["gaps"]
        assert phase["kernels"] >= sum(one["count"] for one in longest) > 0
        assert 0 < len(longest) <= 15
        assert 0 < sum(one["share"] for one in longest) <= 1 + 1e-9
        times = [one["milliseconds"] for one in longest]
        assert times == sorted(times, reverse=True)
        assert phase["busy_seconds"] + gaps["idle_seconds"] == pytest.approx(phase["seconds"])
        assert gaps["count"] > 0
        assert (
            0 < gaps["median_microseconds"] <= gaps["largest_microseconds"] <= gaps["idle_seconds"] * 1e6 * (1 + 1e-9)
        )
        assert not [one for one in longest if one["name"].startswith(MARK)]


def test_a_phase_holds_what_the_trainer_does_in_it(written):
    counts = {
        name: {one["name"]: one["count"] for one in phase["longest"]} for name, phase in written["phases"].items()
    }
    kernels = {name: phase["kernels"] for name, phase in written["phases"].items()}
    # A step multiplies by each of two layers' four weights, those of query, key and value being one, and by the head's.
    products = {name: counts[name]["mkldnn::_linear_pointwise"] for name in ("rollout", profile.DECODE_STEP)}
    assert products[profile.DECODE_STEP] == 2 * 4 + 1
    assert products["rollout"] == 5 * products[profile.DECODE_STEP]
    assert 3 * kernels[profile.DECODE_STEP] < kernels["rollout"]
    assert 0 < written["phases"][profile.DECODE_STEP]["share_of_rollout"] < 1
    assert "distill_kernels::sample" not in {*counts["score"], *counts["update"]}
    assert [name for name in counts["update"] if "ackward" in name]
    assert not [name for phase in ("rollout", "score") for name in counts[phase] if "ackward" in name]


def test_the_plan_counts_the_same_work(written):
    sizes = written["sizes"]
    assert [sizes[letter] for letter in ("P", "T", "N", "prompts", "profiled_tokens")] == [10, 7, 3, 2, 5]
    plan = {name: phase["plan"] for name, phase in written["phases"].items()}
    assert min(part[key] for part in plan.values() for key in ("bytes", "flops")) > 0
    for name in PHASES[:3]:
        assert plan[name]["flops"] == pytest.approx(sum(part["flops"] for part in plan[name]["parts"].values()))
    student, teacher = (profile.Shape(**sizes[name]) for name in ("student", "teacher"))
    # Products alone, of all tokens but the last of each rollout, which is never put in.
    assert plan["score"]["flops"] == pytest.approx(2 * teacher.body() * 2 * (10 + 3 * 6), rel=0.2)
    assert plan["rollout"]["parts"]["prefill"]["flops"] == pytest.approx(2 * student.body() * 2 * 10, rel=0.2)
    assert plan[profile.DECODE_STEP]["flops"] == pytest.approx(2 * 6 * (student.body() + student.head), rel=0.2)
    assert plan[profile.DECODE_STEP]["bytes"] > 4 * (student.body() + student.head)


def test_counted_bytes_and_flops_bound_the_plan_s_seconds():
    sizes, cpu = profile.SHAPES["tiny"], torch.device("cpu")
    work = profile.work_of(sizes, cpu, 8192)
    moved, flops, _ = profile.counted(work, cpu)
    reached = CPU._replace(body=1, head=1, attention=1, copying=1, rows=1, layer_seconds=0, decode_layer_seconds=0)
    machine = Machine("any", 1e15, {2: 1e12, 4: 1e12}, 1e11, efficiency=reached, cuda=False)
    for part, seconds in predict(work, machine).seconds.items():
        longest = max(moved[part] / 1e11, flops[part] / 1e12)
        assert longest * (1 - 1e-9) <= seconds <= moved[part] / 1e11 + flops[part] / 1e12 + 1e-12, part


def test_kernels_belong_to_the_range_they_ran_in():
    events = [
        Event(MARK + "score", 1000, 1000, DeviceType.CPU, annotation=True),
        Event(MARK + "update", 3000, 500, DeviceType.CPU, annotation=True),
        Event("other", 0, 9000, DeviceType.CPU, annotation=True),
        Event(MARK + "score", 1100, 700, annotation=True),
        Event("cudaLaunchKernel", 1000, 400, DeviceType.CPU),
        Event("gemm", 1100, 200),
        Event("norm", 1200, 200),  # beside it, on another stream
        Event("gemm", 1700, 100),
        Event("gemm", 2500, 100),  # of neither
        Event("adam", 3000, 500),
    ]
    ranges, ran = intervals(events, torch.device("cuda"))
    assert set(ranges) == {"score", "update"}
    score, update = (summary(ranges[name], ran) for name in ("score", "update"))
    assert [(one["name"], one["count"]) for one in score["longest"]] == [("gemm", 2), ("norm", 1)]
    assert [one["share"] for one in score["longest"]] == [0.6, 0.4]
    assert score["busy_seconds"] == pytest.approx(400e-9)
    assert score["gaps"] == {
        "count": 3,  # before the first, between, and after the last
        "idle_seconds": 600e-9,
        "median_microseconds": 0.2,
        "largest_microseconds": 0.3,
    }
    assert update["kernels"] == 1
    assert update["gaps"]["count"] == update["gaps"]["largest_microseconds"] == 0


def test_an_operation_s_own_time_is_less_what_it_calls():
    cpu = DeviceType.CPU
    events = [
        Event("matmul", 0, 100, cpu),
        Event("mm", 10, 90, cpu),
        Event("empty", 20, 30, cpu),
        Event("wrapper", 200, 50, cpu),
        Event("all of it", 200, 50, cpu),
        Event("matmul", 0, 40, cpu, thread=2),
    ]
    own = sorted((one.name, one.own) for one in intervals(events, torch.device("cpu"))[1])
    assert own == [("all of it", 50), ("empty", 30), ("matmul", 10), ("matmul", 40), ("mm", 60)]


def test_a_range_in_which_nothing_ran():
    found = summary(Interval("score", 0, 1000, 1000), [])
    assert found["kernels"] == found["busy_seconds"] == 0
    assert found["gaps"]["idle_seconds"] == 1e-6


def test_a_trace_without_kernels_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(profile, "intervals", lambda events, device: (intervals(events, device)[0], []))
    assert profile.main(["--shape", "tiny", "--device", "cpu"]) == 2
    assert "saw nothing run in rollout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profiled-tokens", "3"], "--profiled-tokens: found 3, expected at least 4"),
        (["--steps", "1"], "--steps: found 1, expected at least 2"),
        (["--N", "0"], "--N: found 0, expected at least 1"),
        (["--shape", "qwen3", "--device", "cpu"], "take --shape tiny"),
    ],
)
def test_what_it_cannot_profile(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        profile.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_profiled_rollout_is_no_longer_than_a_rollout():
    sizes, *_ = profile.parse(["--shape", "tiny", "--T", "5", "--profiled-tokens", "9"])
    assert (sizes.T, sizes.profiled_tokens) == (5, 5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_of_replayed_graphs_are_seen_on_cuda(tmp_path):
    path = tmp_path / "profile.json"
    command = [sys.executable, "-m", "benchmarks.profile", "--shape", "tiny", "--device", "cuda", "--out", str(path)]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)  # a process's second trace may be empty
    phases = json.loads(path.read_text())["phases"]
    assert list(phases) == PHASES
    assert phases["rollout"]["kernels"] > 4 * phases[profile.DECODE_STEP]["kernels"] > 0
