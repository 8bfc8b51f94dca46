"""The report of a run that goes on, written anew from time to time."""

import os
import subprocess
import sys
import time

from distill.report import report_page
from distill.run.output import OutputFolder

FIRST, EVERY = 10, 60  # seconds into a run from which on its report is written, and between two times


class LiveReport:
    """A running run's report, made by a process of its own, so that the run never holds all of its logs in memory."""

    def __init__(self, output: OutputFolder) -> None:
        self._output, self._due = output, time.monotonic() + FIRST
        self._process: subprocess.Popen | None = None

    def write(self) -> None:
        """Has it written soon, unless that was done not long ago. What goes wrong then, `finish` meets again."""
        if not self._output.writes or time.monotonic() < self._due or (self._process and self._process.poll() is None):
            return
        self._due = time.monotonic() + EVERY
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distill.report", str(self._output.path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def finish(self) -> None:
        """Writes it, here and now."""
        if not self._output.writes:
            return
        if self._process:
            self._process.wait()
        self._output.write_text("report.html", report_page(self._output.path))
