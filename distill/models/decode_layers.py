"""Layers of a copy that generates, laid out for the small products of a decode step.

Their weights are those of the layers that they stand for, or are brought up to these by `update`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.models.lora import merged_weight
from distill.models.structure import whole


class PackedLinear(nn.Module):
    """Linear layers side by side for a CPU, their weight in the layout in which oneDNN multiplies, packed by `update`.

    The result has the dtype of the packed weight.
    """

    def __init__(self, sources: Sequence[nn.Module], dtype: torch.dtype) -> None:
        """`sources` are linear layers, with or without an adapter, most often one."""
        super().__init__()
        # In a tuple, so that they are no modules of this one.
        self.sources, self.dtype = tuple(sources), dtype
        self._packed = None

    @property
    def weight(self) -> Tensor:
        """The first source's, for code that looks at an output layer's weight."""
        return self.sources[0].weight

    @property
    def bias(self) -> Tensor | None:
        return self.sources[0].bias

    @torch.no_grad()
    def update(self) -> None:
        weight, bias = torch.ops.mkldnn._reorder_linear_weight(self._weight()), self._bias()
        if self._packed is None:
            self._packed = weight, bias
            return
        # The same objects, to which captured steps hold on.
        for ours, new in zip(self._packed, (weight, bias), strict=True):
            if ours is not None:
                ours.data = new

    def _weight(self) -> Tensor:
        return torch.cat([merged_weight(source).to(self.dtype) for source in self.sources]).contiguous()

    def _bias(self) -> Tensor | None:
        if all(source.bias is None for source in self.sources):
            return None
        nothing = (torch.zeros(source.out_features) for source in self.sources)
        biases = (source.bias for source in self.sources)
        given = [none if bias is None else whole(bias.detach()) for bias, none in zip(biases, nothing, strict=True)]
        return torch.cat([bias.to(self.dtype) for bias in given])

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype)
        if self._packed is None:
            return nn.functional.linear(inputs, self._weight(), self._bias())
        return torch.ops.mkldnn._linear_pointwise(inputs, *self._packed, "none", [], "")


class Lookup(nn.Module):
    """An embedding that takes rows by subscripts: of 16 tokens or fewer, the kernel of `embedding` takes six times as
    long on CUDA.
    """

    def __init__(self, source: nn.Embedding) -> None:
        super().__init__()
        self.weight = source.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.weight[token_ids]


class Float32Head(nn.Module):
    """An output layer in the weights' dtype that accumulates and returns float32 logits."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight.dtype != torch.float32 and self.weight.device.type == "cuda":
            rows = hidden.flatten(0, -2).to(self.weight.dtype)
            logits = torch.mm(rows, self.weight.t(), out_dtype=torch.float32).unflatten(0, hidden.shape[:-1])
            return logits if self.bias is None else logits + self.bias
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)
