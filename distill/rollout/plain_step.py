"""A decode step of our own for plain decoder layers: six launches a layer where stock code takes tens.

A step of few rows takes as long as its launches, not as its bytes. `distill_kernels.decode_linear` has each product
with what surrounds it, and `decode_attention` the rest. Which models it fits is found by trying (`decode_probe`); their
prompts go through the model's own layers.
"""

from torch import Tensor, nn

from distill.models import plain_layers
from distill.rollout.kv_cache import DecodeCache
from distill_kernels import Norm, added, begun, normed_gate, normed_heads


def plain_step(body: nn.Module, cache: DecodeCache, token_ids: Tensor, positions: Tensor) -> Tensor:
    """As `decode_step`; raises `NotImplementedError` for a body of another kind."""
    layers = plain_layers(body)
    if layers is None:
        raise NotImplementedError("decoder layers of another kind")
    x = body.embed_tokens(token_ids)
    cos, sin = (each[:, 0] for each in body.rotary_emb(x.float()[:, None], positions[:, None]))
    norms = [layer.norm.weight for layer in layers[1:]] + [body.norm.weight]
    stream = begun(x, layers[0].norm.weight)
    for number, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
        head_norms = tuple(Norm(each.weight, each.eps) for each in layer.head_norms) or None
        of_heads = layer.weights[:3], layer.biases[:3], layer.head_size, head_norms, cos, sin
        query, key, value = (each[:, :, None] for each in normed_heads(stream, layer.norm.eps, *of_heads))
        found = cache.attend(query, key, value, number, layer.scale, window=layer.window).flatten(1).to(x.dtype)
        stream = added(found, layer.weights[3], layer.biases[3], stream.hidden, layer.mlp_norm.weight)
        found = normed_gate(stream, layer.mlp_norm.eps, layer.gate, layer.up)
        stream = added(found, layer.down, None, stream.hidden, norm)
    return body.norm(stream.hidden)
