"""What `triton_decode_linear` does, in PyTorch: in float32 until the end, but for the operands of a product."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from distill_kernels.chunks import accumulation_dtype
from distill_kernels.types import Norm, Stream


def heads(
    stream: Stream,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: tuple[Norm, Norm] | None,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
) -> None:
    D, E = out.shape[2], cos.shape[1]
    kinds = zip(out.split([len(weight) // D for weight in weights], 1), weights, biases, strict=True)
    for kind, (target, weight, bias) in enumerate(kinds):
        found = _normed_product(stream, eps, weight)
        found = (found if bias is None else found + bias).unflatten(1, (-1, D))
        if kind < 2:
            if norms is not None:
                roots = (found.square().mean(-1, keepdim=True) + norms[kind].eps).rsqrt()
                found = found * roots * norms[kind].weight
            turned, rest = found.split([E, D - E], -1)
            one, two = turned.chunk(2, -1)
            turned = turned * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]
            found = torch.cat([turned, rest], -1)
        target.copy_(found)


def gate(stream: Stream, eps: float, gate_weight: Tensor, up_weight: Tensor, out: Tensor) -> None:
    gates, ups = (_normed_product(stream, eps, weight) for weight in (gate_weight, up_weight))
    out.copy_(functional.silu(gates) * ups)


def add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor) -> Stream:
    found = _wide(x) @ _wide(weight).T + residual
    return begin((found if bias is None else found + bias).to(residual.dtype), norm)


def begin(hidden: Tensor, norm: Tensor) -> Stream:
    length = torch.linalg.vector_norm(hidden, dim=-1, dtype=accumulation_dtype(hidden))
    return Stream(hidden, (hidden * norm).to(hidden.dtype), length.square()[None])


def _normed_product(stream: Stream, eps: float, weight: Tensor) -> Tensor:
    mean = stream.squares.sum(0)[:, None] / stream.hidden.shape[1]
    return _wide(stream.scaled) @ _wide(weight).T * (mean + eps).rsqrt()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor))
