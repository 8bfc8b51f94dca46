"""Linear layers that read the same input, such as q_proj, k_proj and v_proj, as one product: for a model that decodes.

A decode step multiplies a few rows by each weight, and then a launch costs as much as the product. The first of the
layers makes the product of all for its input and keeps it until the last has taken its columns. A layer that is called
with another input makes its own, so nothing depends on a model calling them in this order.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Together:
    """The weights of some siblings in one piece, and the product of the input in hand."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.inputs = self.product = None


class Sibling(nn.Module):
    """One of some linear layers whose weights lie in one piece; `weight` is its part."""

    def __init__(self, linear: nn.Linear, together: Together, columns: slice, last: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, None
        self.weight.data = together.weight[columns]
        self._together, self._columns, self._last = together, (columns.start, columns.stop), last

    def forward(self, inputs: Tensor) -> Tensor:
        together = self._together
        if together.inputs is not inputs:
            together.inputs, together.product = inputs, nn.functional.linear(inputs, together.weight)
        start, stop = self._columns
        found = together.product[..., start:stop]
        if self._last:
            together.inputs = together.product = None
        return found


def join_siblings(model: nn.Module, own: Collection[nn.Parameter]) -> None:
    """Replaces siblings in place, where their weights are among `own`, which then are parts of one tensor."""
    own = {id(weight) for weight in own}
    for parent in list(model.modules()):
        for names in SIBLINGS:
            linears = [getattr(parent, name, None) for name in names]
            if all(type(each) is nn.Linear and each.bias is None and id(each.weight) in own for each in linears):
                _join(parent, names, linears)


def _join(parent: nn.Module, names: tuple[str, ...], linears: list[nn.Linear]) -> None:
    weights = [linear.weight for linear in linears]
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return
    together, start = Together(torch.cat([weight.detach() for weight in weights])), 0
    for name, linear in zip(names, linears, strict=True):
        columns = slice(start, start + len(linear.weight))
        setattr(parent, name, Sibling(linear, together, columns, last=name == names[-1]))
        start = columns.stop
