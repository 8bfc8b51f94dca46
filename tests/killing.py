"""Starts the command again and again and kills it with SIGKILL, as often as asked; then lets it come to its end.

`python tests/killing.py CONFIG KILLS SEED` imports everything once and forks a child for each attempt, since the
imports take longer than the run. The parent never computes, so that forking is safe. Prints a line of JSON a kill.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import yaml

import distill.chat
import distill.run
import distill.train


def start(config: str) -> int:
    """The process id of a child that runs the command."""
    child = os.fork()
    if child == 0:
        try:
            status = distill.train.main(["--config", config])
        finally:
            sys.stdout.flush()
            os._exit(status if "status" in locals() else 99)
    return child


def ended(child: int) -> bool:
    found, status = os.waitpid(child, os.WNOHANG)
    if found and status:
        raise SystemExit(f"an attempt ended by itself with wait status {status}")
    return bool(found)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def partials(run: Path) -> list[str]:
    return [path.name for pattern in ("checkpoints/.*.partial", "*.partial", "*.tmp") for path in run.glob(pattern)]


def moment(run: Path, rng: random.Random, kind: str):
    """A condition to kill at, checked again and again."""
    if kind == "partial":  # in the midst of a save, at one of the first, or of what is written at the end
        after = rng.uniform(0, 0.01)
        seen: list[float] = []

        def saving() -> bool:
            if partials(run):
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] >= after

        return saving
    if kind == "start":  # while models are loaded, logs cut back, the first evaluation made
        at = time.monotonic() + rng.uniform(0.05, 0.8)
        return lambda: time.monotonic() >= at
    target = lines(run / "metrics.jsonl") + rng.randint(1, 3)  # between two steps or within one
    delay, reached = rng.uniform(0, 0.05), []

    def stepped() -> bool:
        if not reached and lines(run / "metrics.jsonl") >= target:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] >= delay

    return stepped


def caught(child: int, run: Path) -> bool:
    """Halts the child if it is in the midst of a save, and says whether it is: on a busy machine it may be over."""
    if not partials(run):
        return False
    os.kill(child, signal.SIGSTOP)
    if partials(run):
        return True
    os.kill(child, signal.SIGCONT)
    return False


def main() -> None:
    config, kills, rng = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
    run = Path(yaml.safe_load(Path(config).read_text())["training"]["output_dir"])
    done, attempts = 0, 0
    while done < kills:
        attempts += 1
        kind = ("partial", "step", "start", "step", "partial")[attempts % 5]
        child = start(config)
        reached = moment(run, rng, kind)
        while not (over := ended(child)) and not (reached() and (kind != "partial" or caught(child, run))):
            time.sleep(0.0003)
        if over:  # it came to its end before its moment: too few steps for so many kills
            raise SystemExit(f"the run ended after {done} kills")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
        left = partials(run)
        print(json.dumps({"kind": kind, "step": lines(run / "metrics.jsonl"), "left": left}), flush=True)
    child = start(config)
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
