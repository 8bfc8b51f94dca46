"""Grades of many completions by one function, by as many processes as the work is worth.

A call is lost when its process ends or does not answer in time; that process is then killed with all it has started,
and another goes on with the calls after it. Left out: trying a lost call again, as it would most likely be lost again.
"""

import math
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

from distill.grading.functions import FunctionError, GradingFunction
from distill.grading.process import FunctionProcess, Grade, Surroundings, exchange, frame

MOST_PROCESSES = 4
PATIENCE = 0.5  # seconds into a batch, from which on further processes help
HOPELESS, HOPELESS_AFTER_ANSWERS = 3, 10  # calls lost in a row, and the rest of the batch is not tried
BLOCK_BYTES = 2**20

Call = tuple[Mapping[str, Any], str]


class _Batch:
    """The calls of one `grades`."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.grades: list[Grade | None] = [None] * len(calls)
        self.waiting = deque(range(len(calls)))
        self.helped_from = time.monotonic() + PATIENCE
        self.answered, self.lost_in_a_row = False, 0
        self.no_more: str | None = None
        """Why no further process is started."""

    def block(self, most: int) -> tuple[list[int], list[bytes]]:
        """The next calls, with what is sent for each."""
        numbers, frames, size = [], [], 0
        while self.waiting and len(numbers) < most and size < BLOCK_BYTES:
            number = self.waiting.popleft()
            record, completion = self.calls[number]
            try:
                content = frame((dict(record), completion))
            except Exception as error:  # pickle's own, and whatever an object in the record raises
                why = " ".join(str(error).split())[:200]
                self.grades[number] = Grade(None, f"its record cannot be sent: {type(error).__name__}: {why}")
                continue
            numbers.append(number)
            frames.append(content)
            size += len(content)
        return numbers, frames

    def lose(self, process: FunctionProcess) -> None:
        """The call that a process was at; those behind it wait again."""
        if not process.owed:
            return
        self.grades[process.owed.popleft()] = Grade(None, process.end)
        self.waiting.extendleft(reversed(process.owed))
        process.owed.clear()
        self.lost_in_a_row += 1

    @property
    def hopeless(self) -> bool:
        return self.lost_in_a_row >= (HOPELESS_AFTER_ANSWERS if self.answered else HOPELESS)

    def give_up(self, why: str) -> None:
        self.grades = [Grade(None, why) if grade is None else grade for grade in self.grades]
        self.waiting.clear()


class Grader:
    """One function and its processes, which are started when they are needed and end with this object or its process.

    Batches of several threads come one after another.
    """

    def __init__(
        self,
        function: GradingFunction,
        *,
        timeout_seconds: float = 10,
        memory_gib: float = 4,
        processes: int | None = None,
    ) -> None:
        self.function = function
        self._named = f"{function.key}: {function.reference}"
        self._most = processes or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        # Of now: the run may stand elsewhere when it starts a further process.
        search = [os.path.abspath(place) for place in sys.path]
        self._surroundings = Surroundings(timeout_seconds, memory_gib, os.getcwd(), search)
        self._processes: list[FunctionProcess] = []
        self._lock = threading.RLock()
        weakref.finalize(self, _kill, self._processes, os.getpid())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Loads the function in a first process. Raises `FunctionError` with what went wrong, and in which line."""
        with self._lock:
            if any(process.ready for process in self._processes):
                return
            try:
                process = self._launch()
            except OSError as error:
                raise FunctionError(f"{self._named}: no process can be started: {error}") from None
            try:
                while not process.ready and process.end is None:
                    exchange([process])
                    process.advance()
            finally:
                if not process.ready:
                    self._retire(process)
            if not process.ready:
                raise FunctionError(f"{self._named}: {process.end}")

    def grades(self, calls: Sequence[Call]) -> list[Grade]:
        """A grade for each record with its completion, in their order; never raises for what the function does."""
        with self._lock:
            batch = _Batch(calls)
            try:
                self._collect(batch)  # of processes that have ended since
                while None in batch.grades:
                    self._staff(batch)
                    self._hand_out(batch)
                    if any(process.deadline for process in self._processes):
                        growing = batch.waiting and self._may_grow(batch)
                        exchange(self._processes, max(batch.helped_from, time.monotonic()) if growing else None)
                    self._collect(batch)
            except BaseException:  # an interrupt: what the processes still owe is nobody's
                self.close()
                raise
            return batch.grades

    def close(self) -> None:
        """Kills all processes, with everything that they have started."""
        with self._lock:
            _kill(self._processes, os.getpid())

    def _launch(self) -> FunctionProcess:
        process = FunctionProcess(self.function, self._surroundings)
        self._processes.append(process)
        return process

    def _retire(self, process: FunctionProcess) -> None:
        self._processes.remove(process)
        process.kill()

    def _may_grow(self, batch: _Batch) -> bool:
        """Whether a further process may come; one after another, as each may be the one too many."""
        all_ready = all(process.ready for process in self._processes)
        return all_ready and len(self._processes) < self._most and batch.no_more is None

    def _staff(self, batch: _Batch) -> None:
        """Sees to it that there are processes, or gives up."""
        late = batch.waiting and time.monotonic() >= batch.helped_from
        if batch.no_more is None and (not self._processes or (late and self._may_grow(batch))):
            try:
                self._launch()
            except OSError as error:
                batch.no_more = f"no process can be started: {error}"
        if not self._processes:
            batch.give_up(batch.no_more)

    def _hand_out(self, batch: _Batch) -> None:
        for process in self._processes:
            if process.ready and not process.owed and batch.waiting:
                numbers, frames = batch.block(math.ceil(len(batch.waiting) / (2 * self._most)))
                if numbers:
                    process.give(numbers, frames)

    def _collect(self, batch: _Batch) -> None:
        for process in list(self._processes):
            for grade in process.advance():
                batch.grades[process.owed.popleft()] = grade
                batch.answered, batch.lost_in_a_row = True, 0
            if process.end is None:
                continue
            self._retire(process)
            if process.ready:
                batch.lose(process)
            else:
                batch.no_more = f"no process can be had: {process.end}"
            if batch.hopeless:
                batch.give_up(f"not tried, as the last {batch.lost_in_a_row} calls were lost: {process.end}")
                for busy in [other for other in self._processes if other.owed]:
                    self._retire(busy)
                return


def _kill(processes: list[FunctionProcess], owner: int) -> None:
    if os.getpid() == owner:  # a copy of the process that started them lets them be
        while processes:
            processes.pop().kill()
