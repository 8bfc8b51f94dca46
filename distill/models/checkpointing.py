"""Activation checkpointing for the length of a call: each decoder layer keeps only its input, and is computed again."""

import contextlib
import functools
from collections.abc import Callable, Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

MISSING = object()


@contextlib.contextmanager
def checkpointed(body: nn.Module, recomputing: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Has each layer keep only its input meanwhile; `recomputing` surrounds its second forward, in the backward."""
    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"model type {body.config.model_type!r} has no layers that support checkpointing")
    # The layer itself asks for training mode; its submodules, where dropout lives, keep theirs.
    ours = {
        "gradient_checkpointing": True,
        "training": True,
        "_gradient_checkpointing_func": functools.partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), recomputing())
        ),
    }
    before = [{name: vars(layer).get(name, MISSING) for name in ours} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(ours)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                if value is MISSING:
                    del vars(layer)[name]
                else:
                    vars(layer)[name] = value
