"""Runs the command over ranks, several times: `python tests/over_ranks.py JOBS.json`.

A job has a `config`, a number of `ranks`, more `words` for the command line, and perhaps a `signal`: its name, the rank
that gets it, and after how many lines of metrics; or a rank and its `largest_file` in bytes. SIGTERM comes between two
steps of a run that is short, another signal at any moment of one that has no end. All is imported once and each rank
forked, since the imports take longer than a run. The parent never computes, so that forking is safe. Prints a line of
JSON a job: the wait statuses, and the seconds until the signal and from it to the end.
"""

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from signalled import lines, signal_itself

import distill.run
import distill.train


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(words: list[str], rank: int, size: int, port: int, largest_file: int | None, prepare: Callable) -> int:
    """The process id of a child that is one rank, which calls `prepare` first."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        prepare()
        if largest_file:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        status = 99
        try:
            status = distill.train.main(words)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    return child


def run(job: dict) -> dict:
    size, port = job["ranks"], free_port()
    words, (limited, limit) = ["--config", job["config"], *job["words"]], job.get("largest_file", (0, None))
    name, to, after = job.get("signal", ("", 0, 0))
    began, metrics = time.monotonic(), Path(job["folder"]) / "metrics.jsonl"

    def child(rank: int) -> int:
        itself = (name, to) == ("SIGTERM", rank)
        prepare = partial(signal_itself, name, after, metrics) if itself else lambda: None
        return start(words, rank, size, port, limit if rank == limited else None, prepare)

    children = [child(rank) for rank in range(size)]
    if name not in ("", "SIGTERM"):
        while lines(metrics) < after:
            time.sleep(0.01)
        os.kill(children[to], getattr(signal, name))
    sent = time.monotonic()
    waited_for = [child for rank, child in enumerate(children) if (name, to) != ("SIGSTOP", rank)]
    ended = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in waited_for}
    ending = time.monotonic() - sent
    for child in set(children) - set(ended):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"statuses": [ended.get(child) for child in children], "starting": sent - began, "ending": ending}


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(job)), flush=True)
