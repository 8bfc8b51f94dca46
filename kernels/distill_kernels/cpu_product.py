"""Float32 products through oneDNN on a CPU.

PyTorch gives float32 products to MKL, which on CPUs of another maker than its own uses half of AVX-512: half of what
oneDNN does where those vectors are as wide as they say, and where they are not, 2 to 10 % less
(`pytest benchmarks/test_linear.py`).
Same arithmetic, another order of additions. Other dtypes are left out: PyTorch gives those to oneDNN itself.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# oneDNN keeps compiled code for each shape, and every step brings new numbers of tokens: its default of 1,024 shapes
# grew to 0.4 GiB within 80 steps. A step needs some twenty. Read when the first product is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

CPU = Path("/proc/cpuinfo")


def available(*tensors: Tensor) -> bool:
    """Whether `product` takes these tensors: float32, on a CPU, with something in them, and torch has oneDNN."""
    return torch.backends.mkldnn.is_available() and all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0 for t in tensors
    )


@functools.cache
def mkl_is_as_fast() -> bool:
    """Whether MKL keeps this CPU's units as busy: an Intel CPU, or one of AMD's before Zen 5, which has twice as wide
    vectors as MKL uses there. It can then write a product where it belongs, and takes a transposed operand as it is.

    Asked of the CPU's name and not of a clock: the same seed has to give the same bits.
    """
    lines = (line.split(":", 1) for line in (CPU.read_text().splitlines() if CPU.exists() else ()) if ":" in line)
    about = {name.strip(): value.strip() for name, value in lines}
    amd = about.get("vendor_id") == "AuthenticAMD" and int(about.get("cpu family", 99)) <= 25
    return amd or about.get("vendor_id") == "GenuineIntel"


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[.., H] float32 times the transpose of [V, H], plus [V]: [.., V]. Either may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` of two or more dimensions, with gradients to all three arguments by products of the same kind."""
    return _Linear.apply(inputs, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        found = product(inputs, weight, bias)
        # It is a view of what oneDNN filled, and a function's view may not be changed in place, as some models do.
        return torch.ops.aten._unsafe_view(found, found.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        rows, upstream_rows = inputs.flatten(0, -2), upstream.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            product(upstream_rows, weight.t()).view(inputs.shape) if wanted[0] else None,
            product(upstream_rows.t(), rows.t()) if wanted[1] else None,
            upstream_rows.sum(0) if wanted[2] else None,
        )
