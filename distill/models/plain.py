"""Decoder layers of the plain kind, which most families have: what a decode step of our own computes them from.

    x += O attention(rope(norm(Q n)), rope(norm(K n)), V n),  n = norm(x);     x += D (silu(G n) * U n),  n = norm(x)

with norms of heads, biases of attention and a window where a model has them. The names of a layer's parts say whether
it is one; that nothing else happens between them (scales, rotations of another kind) only a trial can: whoever computes
with what is found here compares it with the model's own forward first.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from distill.models.abilities import windowed_layers
from distill.models.norms import RmsNorm
from distill.models.siblings import Sibling

_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
# Rotations that depend on how long the longest row is, which the host would have to know.
_CHANGING = {"dynamic", "longrope"}
_MLP = ("gate_proj", "up_proj", "down_proj")


class PlainLayer(NamedTuple):
    """The tensors of one layer; weights are those of query, key and value, then of the output."""

    norm: RmsNorm
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    head_size: int
    head_norms: tuple[RmsNorm, ...]
    """Of queries and of keys, or none."""
    scale: float
    window: int | None
    mlp_norm: RmsNorm
    gate: Tensor
    up: Tensor
    down: Tensor


def plain_layers(body: nn.Module) -> list[PlainLayer] | None:
    """The layers of a body whose norms are fused, None where one is of another kind or the body has other parts."""
    if set(dict(body.named_children())) != _BODY or not isinstance(body.norm, RmsNorm):
        return None
    rotation = getattr(body.rotary_emb, "rope_type", None)
    if not isinstance(rotation, str) or rotation in _CHANGING:
        return None
    config = body.config.get_text_config()
    windowed = windowed_layers(config)
    layers = [_plain(layer, config.sliding_window if i in windowed else None) for i, layer in enumerate(body.layers)]
    return None if None in layers else layers


def _plain(layer: nn.Module, window: int | None) -> PlainLayer | None:
    if set(dict(layer.named_children())) != _LAYER:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    products = [getattr(attention, name, None) for name in _PRODUCTS]
    gates = [getattr(mlp, name, None) for name in _MLP]
    of_heads = [norm for name in _HEAD_NORMS if (norm := getattr(attention, name, None)) is not None]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]
    if not {type(each) for each in (*products, *gates)} <= {nn.Linear, Sibling}:
        return None
    if any(type(norm) is not RmsNorm for norm in norms) or "SiLU" not in type(getattr(mlp, "act_fn", None)).__name__:
        return None
    biases = [each.bias for each in products]
    size, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    known = len(norms) + len(products) + len(gates) + sum(bias is not None for bias in biases)
    if (
        None in (size, scale)
        or known != sum(1 for _ in layer.parameters())  # a bias of the gates, or what else there may be
        or len({bias is None for bias in biases[:3]}) > 1
        or [tuple(norm.weight.shape) for norm in of_heads] not in ([], [(size,), (size,)])
    ):
        return None
    weights = [each.weight for each in products]
    gates = [each.weight for each in gates]
    return PlainLayer(norms[0], weights, biases, size, tuple(of_heads), scale, window, norms[1], *gates)
