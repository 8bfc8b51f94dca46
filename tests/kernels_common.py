"""What the kernel tests share: the implementations under test, inputs, and the one rule for tolerances.

Implementations: `twin`, PyTorch on CPU tensors; `interpreted`, the Triton source on CPU tensors, in a process that
started with TRITON_INTERPRET=1 (`test_kernels_interpreted.py` starts one); `cuda`, where there is a GPU. The fused
head has two ways on Hopper: there `interpreted` and `cuda_rows` go through the row kernel, `interpreted_product` and
`cuda` through the student's product where it applies.
Every buffer that an op allocates is full of NaN before the op writes it (`poisoned`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from distill_kernels import backend, chunks, student_product

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = [
    "twin",
    *(["interpreted"] if INTERPRETING else []),
    *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []),
]
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
over_head_implementations = pytest.mark.parametrize(
    "implementation",
    [
        *IMPLEMENTATIONS,
        *(["interpreted_product"] if INTERPRETING else []),
        *([pytest.param("cuda_rows", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []),
    ],
)


@contextmanager
def running(implementation: str, block: int = 256) -> Iterator[torch.device]:
    """Runs the body on one implementation, with poisoned memory; gives the device for its tensors."""
    interprets = implementation.startswith("interpreted")
    with poisoned(), backend.interpreted() if interprets else nullcontext(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_product, "STUDENT_PRODUCT", implementation in ("interpreted_product", "cuda"))
        if interprets:
            _set_blocks(patch, block)
        if implementation == "interpreted_product":
            patch.setitem(chunks.ROW_ALIGNMENT, "cpu", 64)
        yield torch.device("cuda" if implementation.startswith("cuda") else "cpu")


def _set_blocks(patch: pytest.MonkeyPatch, block: int) -> None:
    from distill_kernels import (
        triton_math,
        triton_prefix_attention,
        triton_prefix_blocks,
        triton_sample,
        triton_student_product,
    )

    patch.setattr(triton_math, "BLOCK", block)
    for name in ("BLOCK", "RACE_BLOCK"):
        patch.setattr(triton_sample, name, block)
    columns = min(max(block // 4, 32), 1024)
    few = triton_prefix_blocks.Blocks(16, 16, 1, 1)
    patch.setattr(triton_prefix_attention, "blocks", lambda d, device: (few, few, few))
    patch.setattr(triton_prefix_attention, "SUMMED", 4)
    patch.setattr(triton_student_product, "TILE", triton_student_product.Tile(16, columns, 16, 1, 1))


@contextmanager
def tensor_cores() -> Iterator[None]:
    """On a CPU half-precision operands stay as they are, rows are aligned, and bfloat16 is rounded, as on CUDA."""
    ordinary = chunks.HeadProducts.__init__

    def native(products, *arguments) -> None:
        ordinary(products, *arguments)
        products.native, products.operand = products.dtype != products.accumulate, products.dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.ROW_ALIGNMENT, "cpu", 64)
        patch.setattr(chunks.HeadProducts, "__init__", native)
        patch.setattr(torch, "mm", product_of_tensor_cores)
        patch.setattr(torch, "addmm", lambda add, a, b, **rest: product_of_tensor_cores(a, b, add=add, **rest))
        if INTERPRETING:
            from triton.runtime import interpreter

            truncating = interpreter._convert_float  # cuts bfloat16 off

            def rounding(values, from_dtype, to_dtype, mode):
                if to_dtype.name != "bf16":
                    return truncating(values, from_dtype, to_dtype, mode)
                return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()

            patch.setattr(interpreter, "_convert_float", rounding)
        yield


def product_of_tensor_cores(a: Tensor, b: Tensor, *, out_dtype, out: Tensor | None = None, add: Tensor | None = None):
    """`torch.mm` and `torch.addmm` with `out_dtype` as CUDA has them, whose conditions it checks, on a CPU."""
    assert a.dtype == b.dtype != out_dtype == torch.float32
    assert add is None or add.dtype == out_dtype
    assert out is None or out.dtype == out_dtype
    result = a.float() @ b.float() + (0 if add is None else add)
    return result if out is None else out.copy_(result)


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised tensors are NaN, or the largest integer, as PyTorch's deterministic mode makes them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def exact(tensor: Tensor | None) -> Tensor | None:
    """A float64 copy on the CPU, a leaf that requires a gradient if the original does."""
    if tensor is None:
        return None
    return tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)


def assert_as_good_as_pytorch(ours: Tensor, pytorch: Tensor, truth: Tensor, name: str, constant: float = 2e-6) -> None:
    """Our largest error against float64 is at most that of PyTorch in the same dtype, plus a small constant.

    The constant is in units of the largest value (of 1, if that is smaller): some ten roundings of float32.
    Infinite values must be infinite in all three.
    """
    ours, pytorch, truth = (t.detach().cpu().double() for t in (ours, pytorch, truth))
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    infinite = truth.isinf()
    assert torch.equal(ours[infinite], truth[infinite]), f"{name}: infinite values differ"
    ours, pytorch, truth = (t.masked_fill(infinite, 0) for t in (ours, pytorch, truth))
    error, allowed = (ours - truth).abs().max(), (pytorch - truth).abs().max()
    allowed = allowed.nan_to_num(0) + constant * truth.abs().max().clamp(min=1)
    assert error <= allowed, f"{name}: error {error:.3e} against float64, allowed {allowed:.3e}"
