"""A long run stays flat: memory of the process, objects and open files over 300 steps of a tiny model."""

import json
import statistics
import subprocess
import sys

from conftest import tiny_tokenizer
from test_bad_models import save_pair
from test_train import ROOT, environment

WARM_UP, STEPS = 200, 300

WATCHED = (
    f"WARM_UP, STEPS = {WARM_UP}, {STEPS}"
    + """
import ctypes, gc, json, os, sys
from pathlib import Path
from rich.console import Console
import distill.run.live_report
from distill.config import load_config
from distill.run import Run

distill.run.live_report.FIRST = 0
seen, objects = [], []

def look():
    if len(seen) in (WARM_UP - 100, WARM_UP + STEPS):  # not in between: counting takes memory itself
        gc.collect()
        objects.append(len(gc.get_objects()))
    ctypes.CDLL(None).malloc_trim(0)  # so that what is free does not count, nor pages of files
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    seen.append((1024 * resident, len(os.listdir("/proc/self/fd"))))

run = Run(load_config(sys.argv[1]), Console(file=open(os.devnull, "w")), look)
status = run.execute()
print(json.dumps([status, seen, objects]))
"""
)


def test_memory_and_open_files_stay_flat_over_300_steps(write_config, tmp_path):
    """All of one length: what is kept for each shape of a product, which is bounded, is there after the warm-up."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    changes = save_pair(tmp_path, tokenizer, eos_token_id=None)
    path = write_config(changes | {"training.num_epochs": 101, "training.save_every": 10, "training.eval_every": 50})
    (tmp_path / "prompts.txt").write_text("Say red.\nSay tan.\nSay sky.\nSay one.\nSay two.\n")
    one_thread = environment() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WATCHED, str(path)]
    result = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    status, seen, objects = json.loads(result.stdout.splitlines()[-1])
    assert status == 0
    resident, handles = zip(*seen[WARM_UP : WARM_UP + STEPS], strict=True)
    assert len(resident) == STEPS
    slope = statistics.linear_regression(range(STEPS), resident).slope
    assert slope < 2048, f"{slope:.0f} bytes a step"
    assert len(set(handles)) == 1
    assert objects[1] - objects[0] < 100, objects
