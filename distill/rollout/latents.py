"""Models that cache a latent of every token and make keys and values of it in every step (multi-head latent attention).

The prompt's are made once, in one more step of one token a prompt, and the decode keeps keys and values as it does for
other models: more memory, and nothing is made twice. Left out on purpose: attention on the latents themselves, which
would need the weights that a layer makes its keys from.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from distill.models import attention_as

ATTENTION_NAME = "distill_expanded_latents"


def are_latents(config: Any, keys: Tensor) -> bool:
    """Whether a cache's `keys` [B, heads, P, D] are latents: of one head, and of the configuration's rank."""
    return keys.shape[1] == 1 and keys.shape[3] == getattr(config, "kv_lora_rank", None)


def expanded(body: nn.Module, latents: Cache) -> tuple[list[Tensor], list[Tensor]]:
    """Keys [B, heads, P, D] and values [B, heads, P, Dv] of each layer, from its cached latents."""
    seen = _Latents(latents)
    one = torch.zeros(latents.layers[0].keys.shape[0], 1, dtype=torch.int64, device=latents.layers[0].keys.device)
    with attention_as(body, ATTENTION_NAME):
        body(input_ids=one, position_ids=one, past_key_values=seen, use_cache=True, latents=seen)
    return seen.keys, seen.values


class _Latents(Cache):
    """Gives each layer the latents of the prompts alone, and collects what it makes of them."""

    def __init__(self, latents: Cache) -> None:
        super().__init__(layers=[])
        self._latents, self.keys, self.values = latents, [], []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._latents.get_seq_length()

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        return self._latents.layers[layer_idx].keys, self._latents.layers[layer_idx].values


@torch.compiler.disable
def _collect(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, latents: _Latents, **kwargs
) -> tuple[Tensor, None]:
    latents.keys.append(key)
    latents.values.append(value)
    return query.new_zeros(*query.shape[:1], 1, query.shape[1], value.shape[-1]), None


AttentionInterface.register(ATTENTION_NAME, _collect)
