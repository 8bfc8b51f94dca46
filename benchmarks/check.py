"""`make bench-check`: how many times faster than plain PyTorch the parts are, against what is kept; about a minute.

    python -m benchmarks.check [--update]

Ratios of CPU time on one thread, of small versions of the benchmarks: wall time differs from minute to minute, these do
not. They differ between models of CPU, so that one is compared with its own: fails where a ratio fell by more than 20 %
of the one kept for this model, after up to three measurements. Where none is kept it says so, and compares nothing.
`--update` keeps this model's ratios beside the others'.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import test_rollout, test_shared_prefix
from benchmarks.harness import cpu_model
from benchmarks.kernel_candidates import SAMPLE, linear_ours, linear_pytorch, logits_ours, logits_pytorch, make_head
from distill.forward import completion_hidden

KEPT = Path(__file__).parent / "results" / "check.json"
ALLOWED_FALL = 0.2
ATTEMPTS = 3
Pair = tuple[Callable[[], object], Callable[[], object]]


def pairs() -> dict[str, Pair]:
    """Ours and the plain way, by name."""
    cpu = torch.device("cpu")
    head = make_head(256, 16_384, 256, 256, cpu, torch.float32)
    student, teacher = torch.randn(2, 128, 16_384)
    student.requires_grad_()
    token_ids = torch.randint(16_384, (128,))
    peaked = torch.randn(8, 49_152) * 4
    prompt = test_rollout.prompts_of("tiny", 1, 64)
    return {
        "fused head, reverse_kl": (linear_ours(head, "reverse_kl"), linear_pytorch(head, "reverse_kl")),
        "fused head, sampled_reverse_kl": (
            linear_ours(head, "sampled_reverse_kl"),
            linear_pytorch(head, "sampled_reverse_kl"),
        ),
        "reverse_kl from logits": (
            logits_ours(student, teacher, token_ids),
            logits_pytorch(student, teacher, token_ids),
        ),
        "sample with top-p": (SAMPLE["ours"](peaked, 0.9), SAMPLE["sorting"](peaked, 0.9)),
        "rollouts, one prompt of 64 tokens x 16": (
            lambda: test_rollout.native(test_rollout.engine_of("tiny", "float32"), prompt, 16),
            lambda: test_rollout.stock(test_rollout.stock_of("tiny", "float32"), prompt, 16),
        ),
        "shared prompt, (P, T, N) = (128, 32, 8)": shared_prompt(128, 32, 8),
    }


def shared_prompt(P: int, T: int, N: int) -> Pair:
    model = test_rollout.model_of("tiny")
    inputs = test_shared_prefix.inputs_of(P, T, N)
    ways = completion_hidden, test_shared_prefix.plain
    return tuple(lambda way=way: test_shared_prefix.step(model, way, inputs, N) for way in ways)


def cpu_seconds(call: Callable[[], object], times: int = 1) -> float:
    start = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - start


def measure(pair: Pair, rounds: int = 5) -> float:
    """How many times the CPU time of ours the plain way takes: the median of rounds of 0.1 s or more, taken in turn."""
    for call in pair:
        call()
    times = [max(1, math.ceil(0.1 / cpu_seconds(call))) for call in pair]
    ratios = []
    for _ in range(rounds):
        ours, plain = (cpu_seconds(call, n) / n for call, n in zip(pair, times, strict=True))
        ratios.append(plain / ours)
    return statistics.median(ratios)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description="Guards the benchmarks' ratios.")
    parser.add_argument("--update", action="store_true", help="keep this machine's ratios as those of its model of CPU")
    update = parser.parse_args(argv).update
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machines, model = json.loads(KEPT.read_text()) if KEPT.exists() else {}, cpu_model()
    kept = machines.get(model, {})
    if not (kept or update):
        print(f"{KEPT.name} has no ratios of this CPU ({model}): nothing is compared; --update adds them", flush=True)
    found, fell = {}, []
    for name, pair in pairs().items():
        found[name] = measure(pair)
        least = (1 - ALLOWED_FALL) * kept.get(name, 0.0)
        for _ in range(ATTEMPTS - 1):  # other work on the machine passes, a slower program stays slow
            if found[name] < least:
                found[name] = max(found[name], measure(pair))
        said = f"kept {kept[name]:.2f} x" if name in kept else "none kept"
        print(f"{name:48} {found[name]:6.2f} x, {said}", flush=True)
        if found[name] < least:
            fell.append(name)
    if update:
        machines[model] = {name: round(ratio, 2) for name, ratio in found.items()}
        KEPT.write_text(json.dumps(machines, indent=1) + "\n")
    elif fell:
        print(f"fell by more than {ALLOWED_FALL:.0%}: {'; '.join(fell)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
