"""Measuring: interleaved timing, peak memory, and the machine's own limits, for every benchmark here.

Candidates are timed in turn, round by round, so that a machine that slows down slows all of them down; medians are
reported with the range seen. A fraction of a limit is against a limit measured in the same process, never against a
data sheet. Memory is what the call needed at its peak beyond what was held before it.
"""

import contextlib
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.models import compile_layers, uncompile_layers
from distill_kernels import cpu_product

DRY = os.environ.get("DRY") == "1"
"""With DRY=1 what needs a GPU runs at toy sizes on a CPU, to see that it runs; its seconds mean nothing."""


def gpu_or_cpu() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Timing:
    """Of one candidate, in seconds."""

    samples: tuple[float, ...]
    peak_bytes: int | None = None
    """Memory beyond what was held before, where it was asked for."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.samples) - min(self.samples)) / self.median


@dataclass
class Row:
    """One line of a result table. Absent figures stay None and print as a dash.

    `group` and `name` are the same in every run, so that results can be compared; this project's row is named `ours`.
    """

    group: str
    name: str
    seconds: float
    spread: float | None = None
    bytes: int | None = None
    """Bytes that must be moved."""
    flops: int | None = None
    """Floating-point operations that must be done."""
    fraction: float | None = None
    """Of the time that the machine's measured limits allow: 1 is the limit itself."""
    peak_bytes: int | None = None
    """Memory beyond what was held before."""
    tokens: int | None = None
    """Tokens handled in `seconds`."""
    error: float | None = None
    """Relative, of gradients from bfloat16 inputs where student and teacher are close."""


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked for; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    memory: bool = False,
) -> dict[str, Timing]:
    """Times every candidate once a round; each call includes waiting for the device. With `memory`, the last round
    measures each one's peak too."""
    device = torch.device(device)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: dict[str, int] = {}

    def timed(name: str) -> float:
        synchronize(device)
        start = time.perf_counter()
        candidates[name]()
        synchronize(device)
        return time.perf_counter() - start

    for index in range(warmup + rounds):
        for name in candidates:
            seconds = []
            if memory and index == warmup + rounds - 1:
                peaks[name] = peak_memory(lambda name=name, seconds=seconds: seconds.append(timed(name)), device)
            else:
                seconds.append(timed(name))
            samples[name] += seconds
    return {name: Timing(tuple(values[warmup:]), peaks.get(name)) for name, values in samples.items()}


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that one call needs at its peak beyond what is held before it, its result included.

    On CUDA from the allocator's counters; on a CPU from the kernel's high-water mark of the process's resident
    memory, which Linux resets on request. Call once before, so that libraries have their own buffers already.
    """
    before = memory_mark(device)
    result = call()
    peak = memory_since(before, device)
    del result
    return peak


def memory_mark(device: torch.device | str = "cpu") -> int:
    """Forgets the peak so far; what is held now, for `memory_since`."""
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def memory_since(mark: int, device: torch.device | str = "cpu") -> int:
    """The peak since `memory_mark`, beyond what was held there."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - mark)
    return max(0, _status_bytes("VmHWM") - mark)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory on a CPU is measured on Linux only")


def copy_bandwidth(device: torch.device | str = "cpu", size: int | None = None) -> float:
    """Bytes a second that a copy of one large tensor reads and writes together."""
    device = torch.device(device)
    size = size or (2**30 if device.type == "cuda" else 2**20 if DRY else 2**28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(interleave({"copy": lambda: target.copy_(source)}, rounds=7, device=device)["copy"].samples)
    return 2 * size / best


def gemm_rate(
    M: int, N: int, K: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> float:
    """FLOPs a second of [M, K] times [K, N], by the fastest way there is."""
    a = torch.randn(M, K, device=device).to(dtype)
    b = torch.randn(N, K, device=device).to(dtype)
    out = torch.empty(M, N, dtype=dtype, device=device)
    ways = {"mm": lambda: torch.mm(a, b.T, out=out)}
    if cpu_product.available(a, b):
        ways["oneDNN"] = lambda: cpu_product.product(a, b)
    timings = interleave(ways, rounds=5, device=device)
    return 2 * M * N * K / min(min(timing.samples) for timing in timings.values())


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure needs beside it to mean something."""
    device = torch.device(device)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": _cpu_name(), "device": device.type}
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
        about["cuda"] = torch.version.cuda
    return about


def cpu_model() -> str:
    """The CPU's name and what its maker numbers it by: virtual machines give several generations one name."""
    about = _cpu_info()
    numbers = ("cpu family", "model", "CPU implementer", "CPU part")  # the latter two on ARM, where there is no name
    return ", ".join([_cpu_name(), *(f"{number} {about[number]}" for number in numbers if number in about)])


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or "unknown"


def _cpu_info() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor, nothing where there is none."""
    path, about = Path("/proc/cpuinfo"), {}
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        about.setdefault(key.strip(), value.strip())
    return about


@contextlib.contextmanager
def compiled(*models: nn.Module) -> Iterator[None]:
    """Has their decoder layers compiled meanwhile, as `training.compile` has them on a GPU; elsewhere they stay."""
    if gpu_or_cpu().type == "cuda":
        for model in models:
            compile_layers(model)
    try:
        yield
    finally:
        for model in models:
            uncompile_layers(model)


def ratios(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """By group and name: how many times as long as this project's row of the group a row takes, or as the group's
    first row where there is none of this project's."""
    first = {row.group: row.seconds for row in reversed(rows)} | {r.group: r.seconds for r in rows if r.name == "ours"}
    return {(row.group, row.name): row.seconds / first[row.group] for row in rows}


def growth(rows: Sequence[Row]) -> tuple[float, float]:
    """Exponents of time and peak memory in what the rows' names raise, as `N = 4`: slopes of straight lines through
    the logarithms, by least squares."""
    sizes = [math.log(int(row.name.split(" = ")[1])) for row in rows]
    seconds = [math.log(row.seconds) for row in rows]
    peaks = [math.log(max(1, row.peak_bytes)) for row in rows]
    return statistics.linear_regression(sizes, seconds).slope, statistics.linear_regression(sizes, peaks).slope


def columns(rows: Sequence[Row]) -> dict[str, dict[str, list[str]]]:
    """By group, and in it by column: the rows' figures as text, empty where absent; columns with none are left out."""
    compared = ratios(rows)
    shown = {}
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        cells = {
            "": [row.name for row in members],
            "ms": [f"{row.seconds * 1e3:.2f}" for row in members],
            "spread": [_show(row.spread, "{:.0%}") for row in members],
            "ratio": [f"{compared[group, row.name]:.2f}" for row in members],
            "tokens/s": [_show(row.tokens, "{:.0f}", row.seconds) for row in members],
            "GB": [_show(row.bytes, "{:.3f}", 1e9) for row in members],
            "GFLOP": [_show(row.flops, "{:.1f}", 1e9) for row in members],
            "of limit": [_show(row.fraction, "{:.0%}") for row in members],
            "peak MiB": [_show(row.peak_bytes, "{:.0f}", 2**20) for row in members],
            "error": [_show(row.error, "{:.2%}") for row in members],
        }
        shown[group] = {name: values for name, values in cells.items() if any(values)}
    return shown


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text, a block a group."""
    lines = []
    for group, cells in columns(rows).items():
        lines.append(group)
        padded = []
        for name, values in cells.items():
            texts = [name, *(value or "-" for value in values)]
            width = max(map(len, texts))
            padded.append([text.rjust(width) if name else text.ljust(width) for text in texts])
        lines += ["  " + "  ".join(line).rstrip() for line in zip(*padded, strict=True)]
    return "\n".join(lines)


def _show(value: float | None, pattern: str, unit: float = 1) -> str:
    return "" if value is None else pattern.format(value / unit)


def write_json(path: Path | str, rows: Sequence[Row], device: torch.device | str = "cpu", **more: Any) -> None:
    """Writes the machine, the day, anything in `more` and the rows."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    day = datetime.date.today().isoformat()
    content = {"machine": describe_machine(device), "date": day, **more, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
