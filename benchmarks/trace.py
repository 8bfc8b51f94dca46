"""What a trace of PyTorch's profiler says of our own ranges: what ran in each, what took longest, when nothing ran.

A kernel belongs to the range that it ran in, by time: the calls that launch a CUDA graph do not say which kernels it
has. That is exact where the device is idle at both ends of a range.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from benchmarks.harness import synchronize

MARK = "profiled "  # begins the names of the trace's ranges that are ours
LONGEST = 15


class Interval(NamedTuple):
    """A kernel or an operation: nanoseconds, and those of them that no operation within it has."""

    name: str
    start: int
    end: int
    own: int


@contextmanager
def marked(name: str, device: torch.device) -> Iterator[None]:
    """A named range of the trace that begins and ends with an idle device."""
    synchronize(device)
    with record_function(MARK + name):
        yield
        synchronize(device)


def intervals(events: Sequence[Any], device: torch.device) -> tuple[dict[str, Interval], list[Interval]]:
    """Our ranges by name, and what ran: on CUDA the device's kernels and copies, on a CPU operations."""
    ranges, found = {}, {}
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    for event in events:
        name, start, where = event.name(), event.start_ns(), event.device_type()
        whole = Interval(name, start, start + event.duration_ns(), event.duration_ns())
        if event.is_user_annotation():  # the device has one too, as long as its kernels
            if where == DeviceType.CPU and name.startswith(MARK):
                ranges[name.removeprefix(MARK)] = whole
        elif where == kind:
            thread = event.start_thread_id() if kind == DeviceType.CPU else 0
            found.setdefault(thread, []).append(whole)
    if kind == DeviceType.CUDA:
        return ranges, found.get(0, [])
    return ranges, [one for calls in found.values() for one in _own_time(calls)]


def _own_time(calls: list[Interval]) -> Iterator[Interval]:
    """Of a thread's nested calls, with their time less that of the calls within; those without any are left out."""
    calls.sort(key=lambda one: (one.start, -one.end))
    own, around = [one.own for one in calls], []
    for index, one in enumerate(calls):
        while around and calls[around[-1]].end <= one.start:
            around.pop()
        if around:
            own[around[-1]] -= one.own
        around.append(index)
    return (one._replace(own=time) for one, time in zip(calls, own, strict=True) if time > 0)


def summary(window: Interval, ran: Iterable[Interval]) -> dict[str, Any]:
    """Counts, the longest and the gaps of what ran within a range."""
    inside = sorted(
        (one for one in ran if window.start <= (one.start + one.end) // 2 < window.end), key=lambda one: one.start
    )
    by_name: dict[str, list[int]] = {}
    for one in inside:
        by_name.setdefault(one.name, []).append(one.own)
    total = sum(one.own for one in inside)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    gaps, until = [], window.start
    for one in inside:
        if one.start > until:
            gaps.append(one.start - until)
        until = max(until, one.end)
    if window.end > until:
        gaps.append(window.end - until)
    span, idle = window.end - window.start, sum(gaps)
    return {
        "seconds": span / 1e9,
        "busy_seconds": (span - idle) / 1e9,
        "kernels": len(inside),
        "longest": [
            {"name": name, "count": len(times), "milliseconds": sum(times) / 1e6, "share": sum(times) / total}
            for name, times in longest
        ],
        "gaps": {
            "count": len(gaps),
            "idle_seconds": idle / 1e9,
            "median_microseconds": statistics.median(gaps or [0]) / 1e3,
            "largest_microseconds": max(gaps, default=0) / 1e3,
        },
    }
