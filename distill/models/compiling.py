"""Decoder layers as compiled regions: what lies between two products becomes a few kernels, on a GPU.

A layer is compiled at its first call, once for all lengths, and layers that differ in their weights alone share what
was compiled. Packed attention is one operation within; whatever is marked `torch.compiler.disable`, such as decode
attention and our caches, stays as it is.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Has `torch.compile` take each decoder layer of a model from its next call on, in place."""
    # Else a layer's number, which it hands on to its cache, would make each layer another compilation.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, backend=backend)


def uncompile_layers(model: nn.Module) -> None:
    """Undoes `compile_layers`."""
    for module in model.modules():
        module._compiled_call_impl = None
