"""Float32 linear layers through oneDNN on a CPU, forward and backward.

PyTorch gives float32 products to MKL, which on CPUs of other makers than its own reaches half of what oneDNN does:
180 against 400 GFLOP/s at the sizes of a 135M model on two cores of an AMD EPYC (`pytest benchmarks/test_linear.py`).
Same arithmetic, another order of additions. Left out on purpose: other dtypes, which PyTorch gives to oneDNN itself,
and the model, whose layers stay as they are: the choice lasts as long as the context.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# oneDNN keeps compiled code for each shape, and every step brings new numbers of tokens: its default of 1,024 shapes
# grew to 0.4 GiB within 80 steps. A step needs some twenty. Read when the first product is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[.., H] float32 times the transpose of [V, H], plus [V]: [.., V]. Either may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return product(inputs, weight, bias)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        rows, upstream_rows = inputs.flatten(0, -2), upstream.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            product(upstream_rows, weight.t()).view(inputs.shape) if wanted[0] else None,
            product(upstream_rows.t(), rows.t()) if wanted[1] else None,
            upstream_rows.sum(0) if wanted[2] else None,
        )


class OneDnnLinears(TorchFunctionMode):
    """Inside this context, `nn.functional.linear` of float32 CPU tensors runs on oneDNN, where torch has it."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is nn.functional.linear and _applies(*args[:2]):
            inputs, weight, bias = (*args, None)[:3]
            return _Linear.apply(inputs, weight, (kwargs or {}).get("bias", bias))
        return function(*args, **(kwargs or {}))


def _applies(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.dim() > 1
        and inputs.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
