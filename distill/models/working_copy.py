"""The weights of a model's linear layers in half precision, rounded once a step instead of in every pass.

Under autocast a pass rounds each float32 weight anew, and holds what it rounded to until its backward. Here sampling
has the same tensors, and a pass finds them rounded; its numbers stay the same to the last bit. Gradients are handed on
to the model's own float32 parameters, where an optimizer looks for them. Left out on purpose: the head, whose fused
operation takes the model's own weight, and whatever else autocast computes in float32, such as norms and embeddings.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.structure import alias, text_model


class WorkingCopy:
    """`model` is the copy, to be called under autocast; `refresh` after the weights of its source have changed."""

    def __init__(self, source: PreTrainedModel, dtype: torch.dtype) -> None:
        self.dtype, self.model = dtype, alias(source)
        self.copies: dict[int, nn.Parameter] = {}
        """By the id of a parameter of `source`: what stands for it."""
        self._sources: list[Tensor] = []
        head = self.model.get_output_embeddings()
        for module in text_model(self.model).modules():
            if type(module) is nn.Linear and module is not head:
                module._parameters |= {name: self._copy(weight) for name, weight in module._parameters.items()}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the source's weights."""
        if self._sources:
            torch._foreach_copy_([*self.copies.values()], self._sources)

    def _copy(self, source: nn.Parameter | None) -> nn.Parameter | None:
        if source is None or source.dtype == self.dtype:
            return source
        if id(source) not in self.copies:
            made = nn.Parameter(torch.empty_like(source, dtype=self.dtype), source.requires_grad)
            if source.requires_grad:
                made.register_post_accumulate_grad_hook(partial(_hand_on, source))
            self.copies[id(source)] = made
            self._sources.append(source)
        return self.copies[id(source)]


def _hand_on(source: nn.Parameter, copy: nn.Parameter) -> None:
    """Adds what a backward pass has left at the copy to the source's gradient."""
    gradient, copy.grad = copy.grad, None  # first: where memory runs out below, nothing is left for the next attempt
    if source.grad is None:
        source.grad = gradient.to(source.dtype)
    else:
        source.grad += gradient
