"""A long run stays flat: memory of the process, objects and open files over 300 steps of a tiny model."""

import json
import statistics
import subprocess
import sys

from test_train import ROOT, environment

WARM_UP, STEPS = 400, 300  # until then caches of compiled code and of the allocator fill

WATCHED = (
    f"WARM_UP, STEPS = {WARM_UP}, {STEPS}"
    + """
import gc, json, os, sys
from rich.console import Console
from distill.config import load_config
from distill.run import Run
import psutil

process, seen, objects = psutil.Process(), [], []

def look():
    if len(seen) in (WARM_UP - 50, WARM_UP + STEPS):  # not in between: counting takes memory itself
        gc.collect()
        objects.append(len(gc.get_objects()))
    seen.append((process.memory_info().rss, process.num_fds()))

run = Run(load_config(sys.argv[1]), Console(file=open(os.devnull, "w")), look)
status = run.execute()
print(json.dumps([status, seen, objects]))
"""
)


WARM_UP, STEPS = 400, 300  # until then caches of compiled code and of the allocator fill


def test_memory_and_open_files_stay_flat_over_300_steps(write_config):
    changes = {"training.num_epochs": 140, "training.save_every": 10, "training.eval_every": 50}
    command = [sys.executable, "-c", WATCHED, str(write_config(changes))]
    one_thread = environment() | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    status, seen, objects = json.loads(result.stdout.splitlines()[-1])
    assert status == 0
    resident, handles = zip(*seen[WARM_UP : WARM_UP + STEPS], strict=True)
    assert len(resident) == STEPS
    # The median of many slopes leaves out the allocator's rare jumps, the difference of the ends does not.
    slope = statistics.median((resident[i + 20] - resident[i]) / 20 for i in range(STEPS - 20))
    assert slope < 1024, f"{slope:.0f} bytes a step"
    slope = (sum(resident[-50:]) - sum(resident[:50])) / 50 / (STEPS - 50)
    assert slope < 8192, f"{slope:.0f} bytes a step from the first 50 to the last 50"
    assert len(set(handles)) == 1
    assert objects[1] - objects[0] < 100, objects
