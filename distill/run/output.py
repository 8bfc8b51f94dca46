"""A run's output folder: held by one run at a time, written so that a kill or a full disk leaves every file whole.

What grows is a log of JSON lines, cut back to the checkpoint on resume; everything else is written beside its place
and renamed. A failing disk ends the run with a message, never with half a file in place of a whole one.
"""

import contextlib
import fcntl
import itertools
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from distill.run import checkpoint
from distill.runtime import JsonLines, Processes, json_line, write_whole

LOCK = ".lock"
LOGS = ("metrics", "rollouts", "evaluations", "tokens", "events")


class OutputError(ValueError):
    """An output folder that cannot be used or written, with the reason and the way out."""


class OutputFolder:
    """`training.output_dir`, locked from construction to `release`."""

    writes = True

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self._logs: dict[str, JsonLines] = {}
        self._lock: int | None = self._acquire()

    def release(self) -> None:
        """Lets another run have the folder; one that nothing was written to disappears."""
        if self._lock is not None:
            for log in self._logs.values():
                log.close()
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
            with contextlib.suppress(OSError):
                self.path.rmdir()
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turns what the operating system says while `what` is written into an `OutputError`."""
        try:
            yield
        except checkpoint.WRITING_ERRORS as error:
            reason = getattr(error, "strerror", None) or str(error)
            free = ""
            with contextlib.suppress(OSError):
                free = f"; {shutil.disk_usage(self.path).free // 2**20} MiB are free there"
            saved = checkpoint.list_checkpoints(self.checkpoints)
            kept = f"{saved[-1]} is whole: " if saved else ""
            raise OutputError(
                f"training.output_dir: {what} could not be written to {self.path}: {reason}{free}. "
                f"{kept}make room or make it writable and give the same command again, or name another folder"
            ) from error

    def set_aside(self) -> Path:
        """Renames the folder to the first free `NAME.1`, `NAME.2`, ..., and starts an empty one in its place."""
        names = (self.path.with_name(f"{self.path.name}.{i}") for i in itertools.count(1))
        with self.writing("an empty folder"):
            kept = next(path for path in names if not path.exists())
            self.path.rename(kept)
            (kept / LOCK).unlink()
        os.close(self._lock)
        self._lock = self._acquire()
        return kept

    def open_logs(self, start: checkpoint.Checkpoint | None) -> None:
        """Opens the logs, cut back to what `start` covers; a new run's are empty. Removes what a kill left half."""
        done = start.step if start else 0
        with self.writing("the logs"):
            for partial in (*self.checkpoints.glob(".*.partial"), self.path / "final.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            for partial in self.path.glob("*.tmp"):
                partial.unlink()
            if start:  # the checkpoint may come from another folder, and its logs are the verified ones
                if start.metrics.exists():
                    write_whole(self.path / "metrics.jsonl", start.metrics.read_bytes())
                lines = "".join(map(json_line, start.state["evaluations"]))
                write_whole(self.path / "evaluations.jsonl", lines.encode())
            for name in LOGS:
                path = self.path / f"{name}.jsonl"
                self._logs[name] = JsonLines(path, keep=lambda record: start is not None and record["step"] <= done)

    def log(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Appends to one of the logs."""
        with self.writing(f"{name}.jsonl"):
            self._logs[name].write(records)

    def save(
        self, step: int, tensors: dict, state: dict, *, keep_last: int, best: int | None, ranks: Processes
    ) -> None:
        """Writes a checkpoint once the logs that it refers to are on disk; all `ranks` take part."""

        def sync() -> None:
            for log in self._logs.values():
                log.sync()

        with self.writing(f"the checkpoint of step {step}"):
            ranks.together(sync, checkpoint.WRITING_ERRORS)
            metrics = self.path / "metrics.jsonl"
            checkpoint.save(self.checkpoints, step, tensors, state, keep_last, best=best, metrics=metrics, ranks=ranks)

    def replace(self, name: str, write: Callable[[Path], None]) -> None:
        """Fills the folder `name` by `write`; it appears whole, and an earlier one stays until then."""
        partial, final = self.path / f"{name}.partial", self.path / name
        with self.writing(name):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                write(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    def write_text(self, name: str, text: str) -> None:
        """Writes a file that appears whole."""
        with self.writing(name):
            write_whole(self.path / name, text.encode())

    def _acquire(self) -> int:
        with self.writing("its lock"):
            self.path.mkdir(parents=True, exist_ok=True)
            while True:
                lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Unless its last owner removed the file between the two calls.
                    if os.path.samestat(os.fstat(lock), os.stat(self.path / LOCK)):
                        break
                except FileNotFoundError:
                    pass
                except BlockingIOError:
                    holder = os.read(lock, 200).decode(errors="replace").strip()
                    os.close(lock)
                    raise OutputError(
                        f"training.output_dir: {self.path} is in use by another run ({holder}): wait for it to end, "
                        f"stop it, or name another folder"
                    ) from None
                os.close(lock)
        # Who holds it is only for the message: on a full disk the lock holds without.
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        return lock


class NoOutput(OutputFolder):
    """The same for the ranks that write nothing but their part of each checkpoint."""

    writes = False

    def _acquire(self) -> None:
        return None

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    set_aside = open_logs = log = replace = write_text = _nothing
