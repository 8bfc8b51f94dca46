"""The decode loop behind `generate`: prefill, draw, write, stop, drop finished rows.

Every token is drawn by `distill_kernels.sample` with a random number that depends on (seed, row id, token position)
alone, so neither the wave a row ran in nor the rows beside it change what it says.
Left out on purpose: penalties, beams, constraints. They would make the sampler differ from the scored policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from distill.kv_cache import DecodeCache, PromptCache
from distill_kernels import Sample, sample

# Rows are dropped once this part of them has ended: copying their keys costs about as much as one step.
COMPACT_BELOW = 0.9


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn; temperature above 0, and top_k 0, top_p 1 and min_p 0 leave nothing out."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def warp(self) -> dict[str, float]:
        """The keyword arguments of `sample`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


class Completions(NamedTuple):
    """What R rows said: right-padded int64 [R, T], int64 [R], float32 [R, T] twice (nats), bool [R]."""

    token_ids: Tensor
    lengths: Tensor
    logprob: Tensor
    sampling_logprob: Tensor
    finished: Tensor

    @classmethod
    def empty(cls, rows: int, length: int, pad_token_id: int, device: torch.device) -> "Completions":
        return cls(
            torch.full((rows, length), pad_token_id, dtype=torch.long, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, length, device=device),
            torch.zeros(rows, length, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def write(self, step: int, rows: Tensor, drawn: Sample, ended: Tensor, ends: Tensor, pad_token_id: int) -> Tensor:
        """Stores a step's draw for `rows` not yet `ended`, and marks in place those that one of `ends` ends here.

        Returns the tokens [R] to go on with: padding for the rows that had ended before.
        """
        token_ids = drawn.token_ids.masked_fill(ended, pad_token_id)
        self.token_ids[rows, step] = token_ids
        self.logprob[rows, step] = drawn.logprob.masked_fill(ended, 0.0)
        self.sampling_logprob[rows, step] = drawn.sampling_logprob.masked_fill(ended, 0.0)
        self.lengths[rows] += ~ended
        ended |= torch.isin(token_ids, ends)
        self.finished[rows] = ended
        return token_ids


def prefill(body: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[PromptCache, Tensor]:
    """Runs left-padded prompts [B, P] once; returns their keys and values and the last hidden states [B, H]."""
    positions = (prompt_mask.long().cumsum(-1) - 1).clamp_(min=0)
    cache = DynamicCache()
    output = body(
        input_ids=prompt_ids,
        attention_mask=None if bool(prompt_mask.all()) else prompt_mask.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    # A copy of the last position alone, so that the other positions are freed.
    return PromptCache(keys, values, prompt_mask), output.last_hidden_state[:, -1].clone()


def decode(
    body: nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    prompt: PromptCache,
    last_hidden: Tensor,
    prompt_index: Tensor,
    row_ids: Tensor,
    *,
    sampling: SamplingOptions,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int,
    out: Completions,
) -> None:
    """Continues prompts into `out` (R rows); `prompt_index` [R] is sorted, `row_ids` [R] count the random numbers.

    `body` runs `shared_prefix_attention`; `logits_of` takes hidden states [R, H] to float32 logits [R, V];
    `last_hidden` [B, H] and `prompt` come from `prefill`.
    """
    cache = DecodeCache(prompt, prompt_index, sampling.max_new_tokens)
    positions = prompt.mask.sum(-1)[prompt_index]  # of the first completion token
    ends = torch.tensor(list(eos_token_ids), device=row_ids.device)
    rows = torch.arange(row_ids.numel(), device=row_ids.device)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    logits = logits_of(last_hidden)[prompt_index]
    for step in range(sampling.max_new_tokens):
        drawn = sample(logits, **sampling.warp(), seed=seed, step=step, row_ids=row_ids[rows])
        token_ids = out.write(step, rows, drawn, ended, ends, pad_token_id)
        alive = rows.numel() - int(ended.sum())
        if alive == 0 or step + 1 == sampling.max_new_tokens:
            return
        if alive < COMPACT_BELOW * rows.numel():
            kept = (~ended).nonzero().squeeze(1)
            cache.keep(kept)
            rows, token_ids, positions, ended = rows[kept], token_ids[kept], positions[kept], ended[kept]
        logits = logits_of(decode_step(body, cache, token_ids, positions + step))


def decode_step(body: nn.Module, cache: DecodeCache, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Feeds one token a row, int64 [R] at `positions` [R]; returns the hidden states [R, H] that predict the next."""
    output = body(
        input_ids=token_ids[:, None],
        position_ids=positions[:, None],
        past_key_values=cache,
        use_cache=True,
        decode_cache=cache,
    )
    cache.advance()
    return output.last_hidden_state[:, -1]
