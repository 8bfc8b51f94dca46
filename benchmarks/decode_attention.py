"""A decode step's attention on a card: how a call is cut up, its time against its bytes', its error.

    python -m benchmarks.decode_attention [--seconds 35]
    TRITON_INTERPRET=1 python -m benchmarks.decode_attention --small

At Qwen3-0.6B's shapes, prompts and completions of a run's middle. Each line is one way of cutting: milliseconds for 28
layers, the fraction that the keys' and values' bytes need of it at the bandwidth of a copy measured first, and the
relative error against float64. Calls are timed in captured graphs of ten, each call on a layer's own tensors, so that
no cache holds what a real step would have to read. Left out on purpose: the rest of a step, which test_rollout has.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import copy_bandwidth
from distill_kernels import backend, decode_attention, reference

LAYERS, CALLS = 28, 10


class Shape(NamedTuple):
    R: int
    N: int  # rows a prompt
    P: int
    T: int
    seen: int  # own keys that are read
    Hq: int = 16
    Hkv: int = 8
    D: int = 128


SHAPES = (Shape(64, 16, 256, 512, 256), Shape(256, 16, 256, 512, 256))
SMALL = (Shape(6, 3, 70, 100, 66, 4, 2, 16),)

# Prompt pieces, own pieces, block_m, block_n, warps, stages, most registers; the choice of `plan` comes before these.
CUTS = (
    (2, 1, 32, 64, 4, 2, None), (4, 1, 32, 64, 4, 2, 128), (2, 1, 32, 64, 4, 2, 128), (4, 2, 32, 64, 4, 2, 128),
    (4, 1, 32, 64, 4, 3, None), (2, 1, 32, 64, 4, 3, None), (4, 1, 16, 64, 4, 2, None), (4, 1, 16, 64, 4, 3, None),
    (1, 1, 32, 64, 4, 2, 128), (4, 1, 32, 32, 4, 3, None), (4, 1, 16, 32, 2, 3, None), (2, 1, 32, 128, 4, 2, None),
    (2, 1, 32, 64, 8, 2, None), (4, 1, 64, 64, 4, 2, None),
)  # fmt: skip


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | float | int]:
    """One layer's arguments of `decode_attention`."""
    R, N, P, T, seen, Hq, Hkv, D = shape
    B = R // N
    sizes = {"query": (R, Hq, D)}
    sizes |= dict.fromkeys(("keys", "values"), (R, Hkv, T, D))
    sizes |= dict.fromkeys(("prompt_keys", "prompt_values"), (B, Hkv, P, D))
    sizes |= dict.fromkeys(("new_keys", "new_values"), (R, Hkv, D))
    made = {name: torch.randn(size, device=device, dtype=dtype) for name, size in sizes.items()}
    made |= {"position": torch.tensor([seen - 1], device=device), "scale": D**-0.5, "rows_a_prompt": N}
    made |= {"row_start": torch.arange(0, R + 1, N, device=device)}
    made |= {"left_padding": torch.zeros(B, dtype=torch.int64, device=device)}
    return made | {"ended": torch.zeros(R, dtype=torch.bool, device=device)}


def seconds_each(calls: list[Callable[[], object]], rounds: int = 7) -> float:
    """Median over replays of one captured graph of all the calls, divided by their number; without CUDA, of one run."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[rounds // 2]


def error_of(output: Tensor, layer: dict, N: int) -> float:
    """Relative to the first prompt's rows in float64."""
    own = {name: layer[name][:N].double() for name in ("query", "keys", "values", "new_keys", "new_values")}
    own |= {f"prompt_{name}": layer[f"prompt_{name}"][:1].double() for name in ("keys", "values")}
    row_start = layer["row_start"][:2]
    truth = reference.decode_attention(**own, position=layer["position"], scale=layer["scale"], row_start=row_start)
    return float((output[:N].double() - truth).norm() / truth.norm())


def plan_of(triton_decode_attention, shape: Shape, itemsize: int):
    R, N, P, T, _, Hq, Hkv, D = shape
    return triton_decode_attention.plan(R, Hq, Hkv, D, T, itemsize, B=R // N, P=P, rows=N)


def run(shape: Shape, device: torch.device, dtype: torch.dtype, bandwidth: float, until: float) -> None:
    from distill_kernels import triton_decode_attention

    small = device.type == "cpu"
    layers = [inputs(shape, device, dtype) for _ in range(1 if small else CALLS)]
    keys = shape.R * shape.seen + shape.R // shape.N * shape.P
    floor = LAYERS * keys * 2 * shape.Hkv * shape.D * dtype.itemsize / bandwidth
    print(f"{shape}: {floor * 1e3:.3f} ms are the bytes' own for {LAYERS} layers")

    def report(name: str, calls: list[Callable[[], Tensor]]) -> None:
        if time.perf_counter() > until:
            print(f"  {name}: no time left")
            return
        try:
            error = error_of(calls[0](), layers[0], shape.N)
            took = LAYERS * seconds_each(calls)
        except Exception as problem:  # one way that does not run says so, and the others go on
            print(f"  {name}: FAILED, {type(problem).__name__}: {str(problem)[:200]}")
            return
        print(f"  {name}: {took * 1e3:.3f} ms, {floor / took:.0%}, error {error:.1e}", flush=True)

    chosen, original = plan_of(triton_decode_attention, shape, dtype.itemsize), triton_decode_attention.plan
    calls = [lambda layer=layer: decode_attention(**layer) for layer in layers]
    report(f"chosen, {tuple(chosen)}", calls)
    try:
        for cut in CUTS[:2] if small else CUTS:
            if cut != tuple(chosen):
                triton_decode_attention.plan = lambda *_, cut=cut, **__: triton_decode_attention.Plan(*cut)
                report(f"{cut}", calls)
    finally:
        triton_decode_attention.plan = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=35, help="start nothing new after these")
    parser.add_argument("--small", action="store_true", help="toy shapes on a CPU, through Triton's interpreter")
    options = parser.parse_args()
    until = time.perf_counter() + options.seconds
    device = torch.device("cpu" if options.small else "cuda")
    dtype = torch.float32 if options.small else torch.bfloat16
    with torch.no_grad(), backend.interpreted() if options.small else contextlib.nullcontext():
        bandwidth = copy_bandwidth(device, 2**24 if options.small else 2**30)
        print(f"copy: {bandwidth / 1e12:.3f} TB/s")
        for shape in SMALL if options.small else SHAPES:
            run(shape, device, dtype, bandwidth, until)


if __name__ == "__main__":
    main()
