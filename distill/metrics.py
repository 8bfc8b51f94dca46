"""What a run writes down: one line of JSON an optimizer step, and where the time went.

Every value that lives on an accelerator is gathered into one tensor and read once a step.
"""

import itertools
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
        """Seconds by phase; on a GPU the caller has synchronised by then."""
        totals: dict[str, float] = {}
        for name, start, end in self._spans:
            seconds = start.elapsed_time(end) / 1000 if self._cuda else end - start
            totals[name] = totals.get(name, 0.0) + seconds
        self._spans.clear()
        return totals


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


class JsonLines:
    """An append-only file of JSON objects, one a line, each with the operating system as soon as it is written.

    Opening it cuts off everything from the first line on that is not whole or that `keep` turns down.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda record: False) -> None:
        self._file = path.open("a+b", buffering=0)
        self._file.truncate(_kept_bytes(path, keep))

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends all of the records, or raises OSError and appends none."""
        content, before = memoryview("".join(map(json_line, records)).encode()), self._file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(before)
            raise

    def sync(self) -> None:
        """Returns when everything written is on the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _kept_bytes(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or not keep(json.loads(line)):
                    break
            except (ValueError, KeyError, TypeError):  # not JSON, or not a record of ours
                break
            kept += len(line)
    return kept


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def trend(values: list[float], window: int = 8) -> float:
    """Mean of the last `window` values less the mean of the `window` before them; 0 until there are as many."""
    if len(values) < 2 * window:
        return 0.0
    return (sum(values[-window:]) - sum(values[-2 * window : -window])) / window


def json_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON, with null for what is no finite number."""
    # JSON has no NaN: a reader in another language would stumble over it.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n"
