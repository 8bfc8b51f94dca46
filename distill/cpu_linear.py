"""Float32 linear layers through oneDNN on a CPU, forward and backward; see `distill_kernels.cpu_product` for why.

The model's layers stay as they are: the choice lasts as long as the context.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill_kernels.cpu_product import available, product


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
    # A quantised weight is a tensor of another class that says it is float32.
    ordinary = type(weight) in (Tensor, nn.Parameter)
    return ordinary and available(inputs, weight) and inputs.dim() > 1 and not torch.is_autocast_enabled("cpu")
