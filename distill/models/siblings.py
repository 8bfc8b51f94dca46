"""Linear layers that read the same input, such as a layer's query, key and value, as one product: for a decode step.

A decode step multiplies a few rows by each weight, and then the call costs as much as the product. Which layers read
the same tensor is found by running the model once. The first of them makes the product of all for its input and keeps
it until the last has taken its columns. A layer that is called with another input makes its own, so nothing depends on
a model calling them in this order.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.structure import body_of


class Together:
    """The product of the input in hand with the weights of some siblings."""

    def __init__(self, multiply: Callable[[Tensor], Tensor]) -> None:
        self.multiply = multiply
        self.inputs = self.product = None


class Sibling(nn.Module):
    """One of some linear layers that are computed in one product; `weight` and `bias` are its own."""

    def __init__(self, linear: nn.Module, together: Together, columns: slice, last: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._together, self._columns, self._last = together, (columns.start, columns.stop), last

    def forward(self, inputs: Tensor) -> Tensor:
        together = self._together
        if together.inputs is not inputs:
            together.inputs, together.product = inputs, together.multiply(inputs)
        start, stop = self._columns
        found = together.product[..., start:stop]
        if self._last:
            together.inputs = together.product = None
        return found


@torch.no_grad()
def read_together(model: PreTrainedModel, layers: Collection[nn.Module]) -> list[list[nn.Module]]:
    """Those of `layers` that read one tensor when the model runs, two or more a group, in the order of their calls."""
    calls: list[tuple[nn.Module, Tensor]] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, *inputs))) for layer in layers]
    device = model.get_input_embeddings().weight.device
    try:
        # A model that does not run this way is no worse for layers that stay apart.
        with contextlib.suppress(Exception):
            body_of(model)(input_ids=torch.arange(2, device=device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    once = [layer for layer, _ in calls]
    groups: dict[int, list[nn.Module]] = {}
    for layer, inputs in calls:
        if once.count(layer) == 1:
            groups.setdefault(id(inputs), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


def replace_siblings(model: nn.Module, group: Sequence[nn.Module], multiply: Callable[[Tensor], Tensor]) -> None:
    """Puts siblings, in place, where `model` has the layers of `group`, whose results `multiply` gives side by side."""
    together, start, made = Together(multiply), 0, {}
    for layer in group:
        columns = slice(start, start := start + len(layer.weight))
        made[layer] = Sibling(layer, together, columns, last=layer is group[-1])
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in made:
                setattr(parent, name, made[child])


def join_siblings(model: PreTrainedModel, own: Collection[nn.Parameter]) -> None:
    """Joins plain linear layers whose parameters are among `own`, which then are parts of one tensor."""
    own = {id(weight) for weight in own}
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and all(id(parameter) in own for parameter in module.parameters())
    ]
    for group in read_together(model, layers):
        alike: dict[tuple, list[nn.Linear]] = {}
        for layer in group:
            alike.setdefault((layer.weight.dtype, layer.weight.device, layer.bias is None), []).append(layer)
        for members in alike.values():
            if len(members) > 1:
                replace_siblings(model, members, _multiplied(members))


def _multiplied(layers: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """The product with the weights of all, which become parts of one, as their biases do."""
    joined = {}
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        joined[name] = None if parts[0] is None else torch.cat([part.detach() for part in parts])
        start = 0
        for part in filter(lambda part: part is not None, parts):
            part.data = joined[name][start : start + len(part)]
            start += len(part)
    return lambda inputs: nn.functional.linear(inputs, **joined)
