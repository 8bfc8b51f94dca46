"""Where the time went and what the memory came to; and how figures come to a device and off it.

Every value that lives on an accelerator is gathered into one tensor and read once a step.
"""

import itertools
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class PhaseClock:
    """Seconds spent in each phase since the last `read`; on a GPU by events, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by phase; on a GPU this waits for the end of the last one."""
        totals: dict[str, float] = {}
        if self._cuda and self._spans:
            self._spans[-1][2].synchronize()
        for name, start, end in self._spans:
            seconds = start.elapsed_time(end) / 1000 if self._cuda else end - start
            totals[name] = totals.get(name, 0.0) + seconds
        self._spans.clear()
        return totals


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """What the host has planned, on `device`, copied without making the host wait."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` where a GPU can fetch it by itself: a copy from any other memory is waited for."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_host(values: dict[str, Tensor]) -> dict[str, Any]:
    """Scalars on a device as floats and vectors as lists (None for what is not finite in them), in one copy."""
    numbers = iter(torch.cat([value.detach().double().reshape(-1) for value in values.values()]).tolist())
    return {
        name: [x if math.isfinite(x) else None for x in itertools.islice(numbers, value.numel())]
        if value.dim()
        else next(numbers)
        for name, value in values.items()
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a GPU, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
