"""The command, which sends itself a signal between two steps: from outside it may come after the last of them.

`python tests/signalled.py SIGNAL RANK LINES FOLDER ...`: the words after it are the command's. SIGNAL comes to RANK
where X"""

import atexit
import os
import signal
import sys
from pathlib import Path

import distill.train


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def signal_itself(name: str, after: int, metrics: Path) -> None:
    """Lets the command of this process find, when it looks for a signal, that `name` has just come."""

    class Watch(distill.train.SignalWatch):
        sent = False

        def __getattribute__(self, attribute: str):
            if attribute == "received" and not Watch.sent and lines(metrics) >= after:
                Watch.sent = True
                signal.raise_signal(signal.Signals[name])
            return super().__getattribute__(attribute)

    distill.train.SignalWatch = Watch


if __name__ == "__main__":
    atexit.register(os.abort)
    name, rank, after, folder, *words = sys.argv[1:]
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (rank, "0"):
        signal_itself(name, int(after), Path(folder) / "metrics.jsonl")
    sys.exit(distill.train.main(words))
