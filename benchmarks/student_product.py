"""Both ways of the fused head on Hopper: student logits through memory, or their gradient from the product itself.

    python -m benchmarks.student_product          # about 10 seconds, most of it compilation
    TRITON_INTERPRET=1 python -m benchmarks.student_product --small     # on a CPU: shows that it runs, and no more

For two sizes and two workspaces, of `sampled_reverse_kl`: the largest difference of statistics between the ways, in
nats, and of the gradients, as a norm over the norm. Then milliseconds of forward and backward pass each way, the
fraction of the products' own time at the rate of an 8192^3 product, and the parts of each way.
"""

import argparse
import contextlib
import os
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import describe_machine, gemm_rate, interleave
from benchmarks.row_blocks import Sizes, print_parts, sizes
from distill_kernels import TokenStats, backend, chunks, linear_distill_loss, student_product

WIDTHS = (1024, 2048), (2048, 4096)
WAYS = "product", "rows"


class Head:
    """Inputs of one size, and a step on them."""

    def __init__(self, at: Sizes) -> None:
        generator = torch.Generator(at.device).manual_seed(0)

        def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(rows, width, device=at.device, generator=generator) * scale).to(at.dtype)

        self.trained = normal(at.K, at.Hs).requires_grad_(), normal(at.V, at.Hs, 3 / at.Hs**0.5).requires_grad_()
        teacher = normal(at.K, at.Ht), normal(at.V, at.Ht, 3 / at.Ht**0.5)
        token_ids = torch.randint(at.V, (at.K,), device=at.device, generator=generator)
        self.rest = *teacher, token_ids, torch.rand(at.K, device=at.device, generator=generator)

    def step(self, workspace: int, way: str) -> tuple[TokenStats, tuple[Tensor, ...]]:
        with mock.patch.object(student_product, "STUDENT_PRODUCT", way == "product"):
            loss, stats = linear_distill_loss(*self.trained, *self.rest, workspace_bytes=workspace)
            return stats, torch.autograd.grad(loss, self.trained)


def compare(head: Head, workspace: int) -> None:
    """Prints the differences between the ways."""
    (stats, gradients), (other_stats, others) = (head.step(workspace, way) for way in WAYS)
    largest = {
        name: (ours - other).abs().max().item()
        for name, ours, other in zip(TokenStats._fields, stats, other_stats, strict=True)
    }
    print("  differences: " + ", ".join(f"{name} {value:.1e}" for name, value in largest.items()))
    relative = [
        (torch.linalg.vector_norm(ours - other, dtype=torch.float32) / torch.linalg.vector_norm(other)).item()
        for ours, other in zip(gradients, others, strict=True)
    ]
    print(f"  gradients: hidden states {relative[0]:.1e}, weight {relative[1]:.1e}")


def time_ways(at: Sizes, rate: float) -> None:
    """Prints the differences, and a line a way and workspace."""
    floor = 2 * at.K * at.V * (3 * at.Hs + at.Ht) / rate
    print(f"K {at.K}, V {at.V}, H {at.Hs}/{at.Ht}, {at.dtype}: products alone {floor * 1e3:.2f} ms")
    head = Head(at)
    compare(head, at.workspaces[-1])
    calls = {(way, workspace): partial(head.step, workspace, way) for workspace in at.workspaces for way in WAYS}
    for (way, workspace), timing in interleave(calls, rounds=at.rounds, device=at.device).items():
        print(
            f"  {workspace / 2**30:5.2f} GiB  {way:7}  {timing.median * 1e3:8.2f} ms  "
            f"{floor / timing.median:4.0%} of the products alone"
        )
    for way in WAYS:
        print_parts(at, f"  {way:7}", calls[way, at.workspaces[-1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes")
    options = parser.parse_args()
    if not torch.cuda.is_available() and (os.environ.get("TRITON_INTERPRET") != "1" or not options.small):
        parser.error("without a GPU, set TRITON_INTERPRET=1 and pass --small")
    at = sizes(0, options.small)
    workspaces = at.workspaces if options.small else (2 * 2**30, 4 * 2**30)
    print(describe_machine(at.device))
    rate = gemm_rate(at.product, at.product, at.product, dtype=at.dtype, device=at.device)
    print(f"a product of {at.product}^3: {rate / 1e12:.1f} TFLOP/s")
    with backend.interpreted() if at.device.type == "cpu" else contextlib.nullcontext():
        if at.device.type == "cpu":
            chunks.ROW_ALIGNMENT["cpu"] = 64
        for Hs, Ht in ((at.Hs, at.Ht),) if options.small else WIDTHS:
            time_ways(at._replace(Hs=Hs, Ht=Ht, workspaces=workspaces, rounds=min(at.rounds, 3)), rate)
            if at.device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
