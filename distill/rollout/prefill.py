"""Prompts computed once: their keys and values for all rollouts, in pieces where the whole would not fit."""

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from distill.models import cache_argument, empty_cache, joined, keeps_states, take_keys
from distill.rollout.kv_cache import PromptCache
from distill.rollout.latents import are_latents, expanded


def prefill(
    body: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, at_once: int | None = None
) -> tuple[PromptCache, Tensor]:
    """Runs left-padded prompts [B, P] once; returns their keys and values and the last hidden states [B, H].

    `at_once` columns at a time, all by default; prompts whose layers keep states always go through as a whole.
    """
    every_token_real = bool(prompt_mask.all())
    stateful = keeps_states(body.config)
    if stateful and not every_token_real:
        return _prefill_by_length(body, prompt_ids, prompt_mask)
    cache, states = empty_cache(body.config) if stateful else DynamicCache(), []
    P = prompt_ids.shape[1]
    step = P if stateful or at_once is None else at_once
    for start in range(0, P, step):
        hidden = _run(body, cache, prompt_ids, prompt_mask, slice(start, start + step), every_token_real)
    if stateful:
        keys, values, states = take_keys(cache.layers, hidden.new_empty(len(hidden), 0, hidden.shape[1], 0))
    else:
        keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
    if not stateful and are_latents(body.config.get_text_config(), keys[0]):
        keys, values = expanded(body, cache)
    # On a CPU, attention of few queries is faster in float32 than in bfloat16, whatever the rest is faster in.
    dtype = torch.float32 if prompt_ids.device.type == "cpu" else keys[0].dtype
    keys, values = ([piece.to(dtype) for piece in pieces] for pieces in (keys, values))
    # A copy of the last position alone, so that the other positions are freed.
    return PromptCache(keys, values, prompt_mask, states), hidden[:, -1].clone()


def _run(
    body: nn.Module, cache: Cache, prompt_ids: Tensor, prompt_mask: Tensor, columns: slice, every_token_real: bool
) -> Tensor:
    """Adds the keys and values of some columns to the cache of those before; returns their hidden states."""
    positions = (prompt_mask.long().cumsum(-1) - 1).clamp_(min=0)
    output = body(
        input_ids=prompt_ids[:, columns],
        attention_mask=None if every_token_real else prompt_mask[:, : columns.stop].long(),
        position_ids=positions[:, columns],
        use_cache=True,
        **cache_argument(body, cache),
    )
    return output.last_hidden_state


def _prefill_by_length(body: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[PromptCache, Tensor]:
    """`prefill` without padding, which would enter a state: prompts of equal length together."""
    lengths, width = prompt_mask.sum(1), prompt_ids.shape[1]
    groups = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
    parts = [
        prefill(body, prompt_ids[group, -(n := int(lengths[group[0]])) :], prompt_mask[group, -n:]) for group in groups
    ]
    order = torch.cat(groups).argsort()
    caches = [cache for cache, _ in parts]

    def join(pieces: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([nn.functional.pad(each, (0, 0, width - each.shape[2], 0)) for each in pieces])[order]

    keys, values = (
        [join(pieces) for pieces in zip(*each, strict=True)]
        for each in ([c.keys for c in caches], [c.values for c in caches])
    )
    states = joined([cache.states for cache in caches], order)
    return PromptCache(keys, values, prompt_mask, states), torch.cat([hidden for _, hidden in parts])[order]
