"""Runs the command over ranks, several times: `python tests/over_ranks.py JOBS.json`.

A job has a `config`, a number of `ranks`, more `words` for the command line, and perhaps a `signal`: its name, the rank
that gets it, and after how many lines of metrics; or a rank and its `largest_file` in bytes. All is imported once and
each rank forked, since the imports take longer than a run. The parent never computes, so that forking is safe. Prints a
line of JSON a job.
"""

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp
import torch.distributed.tensor

import distill.run
import distill.train


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(words: list[str], rank: int, size: int, port: int, largest_file: int | None) -> int:
    """The process id of a child that is one rank."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
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


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(job: dict) -> dict:
    size, port = job["ranks"], free_port()
    words, (limited, limit) = ["--config", job["config"], *job["words"]], job.get("largest_file", (0, None))
    children = [start(words, rank, size, port, limit if rank == limited else None) for rank in range(size)]
    name, to, after = job.get("signal", ("", 0, 0))
    while lines(Path(job["folder"]) / "metrics.jsonl") < after:
        time.sleep(0.01)
    sent = time.monotonic()
    if name:
        os.kill(children[to], getattr(signal, name))
    waited_for = [child for rank, child in enumerate(children) if (name, to) != ("SIGSTOP", rank)]
    ended = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in waited_for}
    seconds = time.monotonic() - sent
    for child in set(children) - set(ended):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"statuses": [ended.get(child) for child in children], "seconds": seconds}


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(job)), flush=True)
