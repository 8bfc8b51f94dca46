"""One process of a grading function, as the caller sees it: what it still owes, until when, and how it came to an end.

Nothing here waits but `exchange`: one loop looks after several processes.
"""

import json
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from distill.grading import worker
from distill.grading.functions import GradingFunction

START_SECONDS = 60.0  # at least, until a process has loaded its function
PIECE_BYTES = 2**16
LONGEST_LINE = 2**16  # bytes; an answer is far below


class Grade(NamedTuple):
    """What a function says of a completion: nothing where both are None."""

    value: float | None
    error: str | None


class Surroundings(NamedTuple):
    """What all processes of a function have in common."""

    timeout_seconds: float
    memory_gib: float
    folder: str
    """In which they stand."""
    search: list[str]
    """Where they look for modules, after the folder of the function's file."""


class FunctionProcess:
    """A process that loads a function and then answers calls in order."""

    def __init__(self, function: GradingFunction, surroundings: Surroundings) -> None:
        self.ready = False
        self.end: str | None = None
        """Why it is of no more use."""
        self.owed: deque[int] = deque()
        """The calls without an answer, by the numbers that they were given."""
        self._timeout_seconds = surroundings.timeout_seconds
        self._received, self._outgoing = b"", bytearray()
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__, str(os.getpid()), function.reference],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=surroundings.folder,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,  # the terminal's interrupt is the caller's to answer
        )
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        setup = {
            "path": function.path,
            "source": function.source,
            "function": function.name,
            "column": function.column,
            "library": function.library,
            "built_in": function.sha256 is None,
            "search": surroundings.search,
            "memory_bytes": int(surroundings.memory_gib * 2**30),
        }
        self._outgoing += frame(setup)
        self.deadline: float | None = time.monotonic() + max(START_SECONDS, self._timeout_seconds)

    def give(self, numbers: Sequence[int], frames: Sequence[bytes]) -> None:
        """Calls to answer, of a process that owes none."""
        self.owed.extend(numbers)
        self._outgoing += b"".join(frames)
        self.deadline = time.monotonic() + self._timeout_seconds
        self._write()

    def advance(self) -> list[Grade]:
        """Writes and reads what there is to be, and gives the answers to the first calls that it owed.

        Those are still in `owed`. Where it has come to an end, or to its deadline, `end` says so.
        """
        self._write()
        grades: list[Grade] = []
        ended = self._read()
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            if self.end is None and (grade := self._understood(line, len(self.owed) - len(grades))):
                grades.append(grade)
        if grades:
            self.deadline = time.monotonic() + self._timeout_seconds if len(grades) < len(self.owed) else None
        if self.end is None:
            self.end = self._why(ended)
        return grades

    def _why(self, ended: bool) -> str | None:
        if ended:
            return f"its process ended ({worker.exit_text(self._process.wait())})"
        if len(self._received) > LONGEST_LINE:
            return "its process wrote what is no answer"
        if self.deadline is None or time.monotonic() < self.deadline:
            return None
        if not self.ready:
            return f"its process was not ready within {max(START_SECONDS, self._timeout_seconds):g} s"
        return f"no answer within {self._timeout_seconds:g} s"

    def _write(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._input, self._outgoing[:PIECE_BYTES])]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # the other pipe says how it ended
            self._outgoing.clear()

    def _read(self) -> bool:
        """Whether that was the last."""
        pieces = [self._received]
        try:
            while piece := os.read(self._output, PIECE_BYTES):
                pieces.append(piece)
                if len(pieces) > 64:  # of one that writes on and on; the rest is read the next time
                    return False
            return True
        except BlockingIOError:
            return False
        finally:
            self._received = b"".join(pieces)

    def _understood(self, line: bytes, owed: int) -> Grade | None:
        """The grade in a line; of other lines, what they say is noted."""
        try:
            said: dict[str, Any] = dict(json.loads(line))
            if "ended" in said:
                self.end = f"its process ended ({said['ended']})"
                return None
            error = said.get("error")
            if not self.ready:
                self.ready, self.end, self.deadline = error is None and said["ready"], error, None
                return None
            value = None if error is not None or said["value"] is None else float(said["value"])
            if not owed or (value is not None and not math.isfinite(value)):
                raise ValueError
            return Grade(value, error)
        # The function itself may have written anything, and deep enough for a RecursionError.
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            self.end = "its process wrote what is no answer"
            return None

    def kill(self) -> None:
        """Ends it with everything that it has started, however it feels about that."""
        self._process.stdin.close()
        self._process.terminate()
        self._process.send_signal(signal.SIGCONT)  # the function may have stopped it
        try:
            self._process.wait(2 * worker.KILL_SECONDS)
        except subprocess.TimeoutExpired:
            worker.send([*worker.descendants(self._process.pid), self._process.pid], signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()

    def watch(self, poll: select.poll) -> None:
        """Has `poll` look for what `advance` can do."""
        poll.register(self._output, select.POLLIN)
        if self._outgoing:
            poll.register(self._input, select.POLLOUT)


def frame(content: Any) -> bytes:
    """What a function's process reads as one thing; raises what `pickle` raises."""
    data = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(worker.LENGTH_BYTES, "big") + data


def exchange(processes: Sequence[FunctionProcess], until: float | None = None) -> None:
    """Returns when a process has something to read or to take, at the first deadline, or at a time before that."""
    poll = select.poll()
    for process in processes:
        process.watch(poll)
    due = [process.deadline for process in processes if process.deadline is not None]
    due += [] if until is None else [until]
    poll.poll(math.ceil(max(0.0, min(due) - time.monotonic()) * 1000))
