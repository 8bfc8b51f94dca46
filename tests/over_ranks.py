"""Runs the command over ranks, several times: `python tests/over_ranks.py JOBS.json`.

A job is a configuration's path, a number of ranks and more words for the command line. All is imported once and each
rank forked, since the imports take longer than a run. The parent never computes, so that forking is safe.
"""

import json
import os
import socket
import sys
import time
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


def start(words: list[str], rank: int, size: int, port: int) -> int:
    """The process id of a child that is one rank."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        if size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            status = distill.train.main(words)
        finally:
            sys.stdout.flush()
            os._exit(status if "status" in locals() else 99)
    return child


def main() -> None:
    for config, size, *more in json.loads(Path(sys.argv[1]).read_text()):
        port, began = free_port(), time.monotonic()
        children = [start(["--config", config, *more], rank, size, port) for rank in range(size)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(config, size, more, statuses, f"{time.monotonic() - began:.1f} s", flush=True)
        if any(statuses):
            sys.exit(1)


if __name__ == "__main__":
    main()
