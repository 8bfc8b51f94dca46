"""The fused head on a GPU: its row kernel by block and warps, then the whole by workspace, and what its parts take.

    python -m benchmarks.row_blocks [--rows 1408]
    TRITON_INTERPRET=1 python -m benchmarks.row_blocks --small     # on a CPU: shows that it runs, and no more

Bytes are what the row kernel must move: both rows of logits in for the sums, one of them (`sampled_reverse_kl`) or both
again for the gradient, which goes out in half precision; a row of two models is 1.2 MB, and does not stay in the cache.
The floor of the whole is the time of its products alone, 2 K V (3 Hs + Ht) operations, at the rate of an 8192^3 product
measured here. The parts are timed in a run of their own, by events around each. The whole goes through the row kernel
everywhere; `benchmarks.student_product` times the other way, which Hopper takes where it can.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import copy_bandwidth, describe_machine, gemm_rate, interleave, synchronize
from distill_kernels import backend, linear_distill_loss, student_product
from distill_kernels.chunks import HeadProducts, row_buffer
from distill_kernels.types import OBJECTIVES, Head

PASSES = {"sampled_reverse_kl": 3, "reverse_kl": 4}  # over float32 logits; and one over the gradient


class Sizes(NamedTuple):
    """What is timed, on which device."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    K: int
    V: int
    Hs: int
    Ht: int
    shapes: tuple[tuple[int, int], ...]
    """Columns a block, and warps."""
    workspaces: tuple[int, ...]
    """Bytes."""
    product: int
    """M, N and K of the product whose rate is the limit."""
    rounds: int


def sizes(rows: int, small: bool) -> Sizes:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if small:
        shapes, workspaces = ((64, 1), (128, 2)), (2**14, 2**20)
        return Sizes(device, torch.float32, 3, 12, 300, 16, 24, shapes, workspaces, 64, 1)
    shapes = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (2048, 16), (4096, 16), (8192, 16))
    workspaces = tuple(gib * 2**30 for gib in (1, 2, 4, 8))
    return Sizes(device, torch.bfloat16, rows, 8192, 151_936, 1024, 2048, shapes, workspaces, 8192, 5)


def set_shape(shape: tuple[int, int]) -> None:
    """Of every launch of the row kernel from now on."""
    from distill_kernels import triton_math

    triton_math.BLOCK, triton_math.WARPS = shape


def time_row_kernel(at: Sizes) -> tuple[int, int]:
    """Prints a line a shape and objective; the shape that takes the least over both objectives."""
    rows_module = backend.implementation("rows", at.device)
    student, teacher = (row_buffer(at.rows, at.V, torch.float32, at.device).normal_(0, 3) for _ in range(2))
    grad = row_buffer(at.rows, at.V, at.dtype, at.device)
    token_ids = torch.randint(at.V, (at.rows,), device=at.device)
    stats, per_row = torch.empty(6, at.rows, device=at.device), torch.empty(2, at.rows, device=at.device)
    limit, total = copy_bandwidth(at.device, 2**20 if at.device.type == "cpu" else None), defaultdict(float)
    print(f"row kernel: {at.rows} x {at.V} float32, gradient {at.dtype}; a copy moves {limit / 1e12:.2f} TB/s")
    for objective, passes in PASSES.items():
        expected = None
        candidates = {}
        for shape in at.shapes:

            def call(shape: tuple[int, int] = shape, objective: str = objective) -> None:
                set_shape(shape)
                rows_module.distill_rows(
                    student, teacher, token_ids, None, stats, per_row[0], per_row[1], grad,
                    advantage=None, objective=OBJECTIVES.index(objective), importance_clip=None, beta=0.5,
                    temperature=1.0, student_head=Head(None, None, 1.0), teacher_head=Head(None, None, 1.0),
                )  # fmt: skip

            call()  # compiles
            expected = stats.clone() if expected is None else expected
            torch.testing.assert_close(stats, expected, rtol=1e-4, atol=1e-4)
            candidates[shape] = call
        size = at.rows * at.V * (4 * passes + at.dtype.itemsize)
        for shape, timing in interleave(candidates, rounds=at.rounds, device=at.device).items():
            total[shape] += timing.median
            rate = size / timing.median
            print(
                f"  {objective:18}  {shape[0]:5} x {shape[1]:2}  {timing.median * 1e3:8.3f} ms  "
                f"{rate / 1e12:.2f} TB/s  {rate / limit:4.0%} of a copy"
            )
    return min(total, key=total.get)


def time_head(at: Sizes) -> None:
    """Prints a line a workspace and objective, then the parts."""
    rate = gemm_rate(at.product, at.product, at.product, dtype=at.dtype, device=at.device)
    flops = 2 * at.K * at.V * (3 * at.Hs + at.Ht)
    floor = flops / rate
    print(f"fused head: K {at.K}, V {at.V}, H {at.Hs}/{at.Ht}, {at.dtype}")
    print(f"  products alone {floor * 1e3:.2f} ms at the {rate / 1e12:.1f} TFLOP/s of {at.product}^3")
    tensors = [torch.randn(n, H, device=at.device) for H in (at.Hs, at.Ht) for n in (at.K, at.V)]
    student_hidden, student_weight, *teacher = (
        (tensor * (3 / tensor.shape[1] ** 0.5 if len(tensor) == at.V else 1)).to(at.dtype) for tensor in tensors
    )
    trained = student_hidden.requires_grad_(), student_weight.requires_grad_()
    rest = (*teacher, torch.randint(at.V, (at.K,), device=at.device), torch.rand(at.K, device=at.device))

    def step(objective: str, workspace: int) -> None:
        loss, _ = linear_distill_loss(*trained, *rest, objective=objective, workspace_bytes=workspace)
        torch.autograd.grad(loss, trained)

    for objective in PASSES:
        calls = {workspace: partial(step, objective, workspace) for workspace in at.workspaces}
        timings = interleave(calls, rounds=at.rounds, device=at.device, memory=True)
        for workspace, timing in timings.items():
            print(
                f"  {objective:18}  {workspace / 2**30:5.2f} GiB  {timing.median * 1e3:8.2f} ms  "
                f"{floor / timing.median:4.0%} of the products alone  peak {timing.peak_bytes / 2**30:.2f} GiB"
            )
        for workspace, call in calls.items():
            print_parts(at, f"  {objective:18}  {workspace / 2**30:5.2f} GiB", call)


def print_parts(at: Sizes, label: str, call: Callable[[], None]) -> None:
    """What one call takes in each of its parts; products with their rate."""
    totals: dict[str, list[float]] = defaultdict(list)
    for _ in range(at.rounds):
        with parts_timed(at.device) as parts:
            call()
            synchronize(at.device)
        for name, marks in parts.items():
            totals[name].append(sum(milliseconds(*pair) for pair in marks))
    one_kernel = "launch_product" in totals  # multiplies by the student's head
    flops = {"logits": at.Ht + (0 if one_kernel else at.Hs)}
    flops |= dict.fromkeys(("launch_product", "hidden_gradient", "weight_gradient"), at.Hs)
    texts = []
    for name, values in totals.items():
        ms = statistics.median(values)
        of_product = 2 * at.K * at.V * flops.get(name, 0) / (ms / 1e3) / 1e12
        texts.append(f"{name} {ms:.2f} ms" + (f" ({of_product:.0f} TFLOP/s)" if name in flops else ""))
    print(f"{label}  " + ", ".join(texts))


Mark = torch.cuda.Event | float


@contextlib.contextmanager
def parts_timed(device: torch.device) -> Iterator[dict[str, list[tuple[Mark, Mark]]]]:
    """Marks the beginning and end of every product and row kernel inside, by its function's name."""
    marks: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)
    modules = {of: backend.implementation(of, device) for of in ("rows", "student_product")}
    places = [(HeadProducts, name) for name in ("logits", "hidden_gradient", "weight_gradient")]
    places += [(modules["rows"], "distill_rows")]
    in_product = "launch_references", "launch_product", "finish", "put_target"
    places += [(modules["student_product"], name) for name in in_product]
    ordinary = [(owner, name, getattr(owner, name)) for owner, name in places]

    def timed(name: str, function: Callable) -> Callable:
        @wraps(function)
        def between_marks(*args, **options) -> Tensor | None:
            before = mark(device)
            result = function(*args, **options)
            marks[name].append((before, mark(device)))
            return result

        return between_marks

    for owner, name, function in ordinary:
        setattr(owner, name, timed(name, function))
    try:
        yield marks
    finally:
        for owner, name, function in ordinary:
            setattr(owner, name, function)


def mark(device: torch.device) -> Mark:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(before: Mark, after: Mark) -> float:
    return (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1408, help="of the row kernel's logits, 1408 is a chunk of 2 GiB")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    options = parser.parse_args()
    if not torch.cuda.is_available() and (os.environ.get("TRITON_INTERPRET") != "1" or not options.small):
        parser.error("without a GPU, set TRITON_INTERPRET=1 and pass --small")
    at = sizes(options.rows, options.small)
    print(describe_machine(at.device))
    student_product.STUDENT_PRODUCT = False
    with backend.interpreted() if at.device.type == "cpu" else contextlib.nullcontext():
        best = time_row_kernel(at)
        set_shape(best)
        print(f"from here on {best[0]} columns x {best[1]} warps")
        time_head(at)


if __name__ == "__main__":
    main()
