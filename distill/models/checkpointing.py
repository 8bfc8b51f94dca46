"""Activation checkpointing for the length of a call: each decoder layer keeps only its input, and is computed again.

A layer that fills a cache keeps what the cache held before, too, and fills a copy of that when it is computed again.
What is compiled of a layer stays within what is checkpointed: the compiler does not take the contexts here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from distill.models.states import snapshot

MISSING = object()


@contextlib.contextmanager
def checkpointed(
    body: nn.Module, recomputing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
) -> Iterator[None]:
    """Has each layer keep only its input meanwhile; `recomputing` surrounds its second forward, in the backward."""
    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    # One within another would be a checkpoint in the first forward and none in the second, where it is no longer asked.
    within = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    layers = [layer for layer in layers if id(layer) not in within]
    if not layers:
        raise ValueError(f"model type {body.config.model_type!r} has no layers that support checkpointing")
    run = functools.partial(
        _checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), recomputing())
    )
    ours = [_settings(layer, run) for layer in layers]
    before = [{name: vars(layer).get(name, MISSING) for name in new} for layer, new in zip(layers, ours, strict=True)]
    try:
        for layer, new in zip(layers, ours, strict=True):
            vars(layer).update(new)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                if value is MISSING:
                    del vars(layer)[name]
                else:
                    vars(layer)[name] = value


def _settings(layer: nn.Module, run: Callable) -> dict[str, Any]:
    """What of a layer has each of its calls go through `run`."""
    compiled = layer._compiled_call_impl
    if compiled is not None:
        return {"_compiled_call_impl": lambda *inputs, **named: run(functools.partial(compiled, **named), *inputs)}
    # The layer itself asks for training mode; its submodules, where dropout lives, keep theirs.
    return {
        "gradient_checkpointing": True,
        "training": True,
        "_can_checkpoint_with_cache": True,  # else it would be given none
        "_gradient_checkpointing_func": run,
    }


def _checkpoint(function: functools.partial, *inputs: Any, **options: Any) -> Any:
    """`checkpoint` of a layer's forward with its arguments, a cache perhaps among them."""
    caches = [given for given in (*inputs, *function.keywords.values()) if isinstance(given, Cache)]
    if not caches:
        return checkpoint(function, *inputs, **options)
    before, first = snapshot(caches[0].layers), True

    def run(*given: Any) -> Any:
        nonlocal first
        if first:
            first = False
            return function(*given)
        other = Cache(layers=snapshot(before))

        def swapped(value: Any) -> Any:
            return other if isinstance(value, Cache) else value

        named = {name: swapped(value) for name, value in function.keywords.items()}
        return function.func(*function.args, *map(swapped, given), **named)

    return checkpoint(run, *inputs, **options)
