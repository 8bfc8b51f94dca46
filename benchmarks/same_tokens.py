"""Whether a run samples the same tokens however it is spread out: over threads, ranks and waves.

    python -m benchmarks.same_tokens [--steps 10]

Runs `configs/default.yaml` in float32 for some steps: as it is, on one thread, on two ranks, and with as little memory
for rollouts as makes several waves. Compares each completion in `rollouts.jsonl` with that of the first way. Sums in
another order round differently, and a step of training carries that on; a draw is decided by rounding only where its
two best candidates all but tie.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from distill.runtime import read_json_lines

WAYS = {
    "one process": ([], {}),
    "one thread": ([], {"OMP_NUM_THREADS": "1"}),
    "two ranks": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], {}),
    "several waves": ([], {}),
}
SMALL_WAVES = ["--rollout.memory_gib", "0.02"]


def rollouts(way: str, steps: int, folder: Path) -> list[tuple[int, str, int]]:
    """Each rollout's step, completion and number of tokens, in the order of the run."""
    launcher, environment = WAYS[way]
    command = [sys.executable, *launcher, "-m", "distill.train", "--config", "configs/default.yaml"]
    command += ["--training.max_steps", str(steps), "--training.output_dir", str(folder), "--training.device", "cpu"]
    command += ["--rollout.precision", "float32", "--training.precision", "float32", "--prompts.eval_limit", "1"]
    command += SMALL_WAVES if way == "several waves" else []
    paths = {"PYTHONPATH": os.pathsep.join([".", "kernels"])}
    subprocess.run(command, check=True, env=os.environ | paths | environment, stdout=subprocess.DEVNULL)
    lines = read_json_lines(folder / "rollouts.jsonl")
    return [(line["step"], line["completion"], line["completion_length"]) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = {way: rollouts(way, options.steps, Path(folder) / str(index)) for index, way in enumerate(WAYS)}
    first = made.pop("one process")
    print(f"one process: {len(first)} rollouts, {sum(length for *_, length in first)} tokens")
    for way, others in made.items():
        differing = [ours[0] for ours, other in zip(first, others, strict=True) if ours != other]
        print(
            f"{way}: {len(differing)} rollouts differ" + (f", in steps {sorted(set(differing))}" if differing else "")
        )


if __name__ == "__main__":
    main()
