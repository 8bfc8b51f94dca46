"""Float32 linear layers through oneDNN on a CPU, forward and backward; see `distill_kernels.cpu_product` for why.

The model's layers stay as they are: the choice lasts as long as the context.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill_kernels import cpu_product


class OneDnnLinears(TorchFunctionMode):
    """Inside this context, `nn.functional.linear` of float32 CPU tensors runs on oneDNN, where torch has it."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is nn.functional.linear and _applies(*args[:2]):
            inputs, weight, bias = (*args, None)[:3]
            return cpu_product.linear(inputs, weight, (kwargs or {}).get("bias", bias))
        return function(*args, **(kwargs or {}))


def _applies(inputs: Tensor, weight: Tensor) -> bool:
    # A quantised weight is a tensor of another class that says it is float32.
    plain = type(weight) in (Tensor, nn.Parameter) and not torch.is_autocast_enabled("cpu")
    return plain and inputs.dim() > 1 and cpu_product.available(inputs, weight)
