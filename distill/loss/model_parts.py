"""A model as the loss computes with it: body, head, precision, and where it is while it computes."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.forward import completion_hidden


class ModelParts(NamedTuple):
    """A model as it is computed with: body, head (a `models.Head`), and the precision of the arithmetic."""

    body: nn.Module
    head: tuple | None  # None where `hidden` gives log-probabilities [K, width] instead, first the sampled token's
    dtype: torch.dtype
    present: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """Surrounds a phase in which the body computes: it may live elsewhere the rest of the time."""
    elsewhere = False  # whether another process computes the body
    silent = False  # whether there is no teacher: the sampled token is then all that there is to learn
    one_call: bool = False
    """Whether `hidden` has to call the body once, as where its weights are gathered from other ranks for a call."""
    refresh: Callable[[], None] = lambda: None
    """Brings the body up to weights that have changed, where it has copies of them."""

    def hidden(self, *rollouts, **options) -> Tensor:
        """`completion_hidden` of this model in its precision, whatever the precision of its weights."""
        mixed = self.head.weight.dtype != self.dtype
        context = torch.autocast(self.head.weight.device.type, self.dtype) if mixed else contextlib.nullcontext()
        with context:
            hidden = completion_hidden(self.body, *rollouts, one_call=self.one_call, **options)
        return hidden.to(self.dtype)

    def head_arguments(self, name: str) -> dict:
        """The head as keyword arguments of the fused operations, each beginning with `name`."""
        head = self.head
        return {f"{name}_bias": head.bias, f"{name}_softcap": head.softcap, f"{name}_scale": head.scale}
