"""The decode loop behind `generate`: prefill, draw, write, stop, drop finished rows.

Every token is drawn by `distill_kernels.sample` with random numbers that depend on (seed, row id, token position)
alone, so neither the wave a row ran in nor the rows beside it change what it says.
Left out on purpose: penalties, beams, constraints. They would make the sampler differ from the scored policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from distill.models import cache_argument, empty_cache, joined, keeps_states, take_keys
from distill.rollout.kv_cache import DecodeCache, PromptCache, StaticDecodeCache
from distill.rollout.latents import are_latents, expanded
from distill_kernels import Sample, sample

# Rows are dropped once this part of them has ended: copying their keys costs about as much as one step.
COMPACT_BELOW = 0.9

# On CUDA: how often the end is looked for; the rows a graph may have; the completion slots by which attention
# that is not fused grows.
CHECK_EVERY = 16
ROW_BUCKETS = (1, *(rows for power in range(1, 13) for rows in (2**power, 3 * 2**power // 2)))
SLOTS_SHOWN = 128


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

    def write(
        self, step: int | Tensor, rows: Tensor, drawn: Sample, ended: Tensor, ends: Tensor, pad_token_id: int
    ) -> Tensor:
        """Stores a step's draw for `rows` not yet `ended`, and marks in place those that one of `ends` ends here.

        Returns the tokens [R] to go on with: padding for the rows that had ended before.
        """
        token_ids = drawn.token_ids.masked_fill(ended, pad_token_id)
        self.token_ids[rows, step] = token_ids
        self.logprob[rows, step] = drawn.logprob.masked_fill(ended, 0.0)
        self.sampling_logprob[rows, step] = drawn.sampling_logprob.masked_fill(ended, 0.0)
        self.lengths[rows] += ~ended
        ended |= (token_ids[:, None] == ends).any(1)
        self.finished[rows] = ended
        return token_ids


def prefill(body: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[PromptCache, Tensor]:
    """Runs left-padded prompts [B, P] once; returns their keys and values and the last hidden states [B, H]."""
    every_token_real = bool(prompt_mask.all())
    stateful = keeps_states(body.config)
    if stateful and not every_token_real:
        return _prefill_by_length(body, prompt_ids, prompt_mask)
    positions = (prompt_mask.long().cumsum(-1) - 1).clamp_(min=0)
    cache = empty_cache(body.config) if stateful else DynamicCache()
    output = body(
        input_ids=prompt_ids,
        attention_mask=None if every_token_real else prompt_mask.long(),
        position_ids=positions,
        use_cache=True,
        **cache_argument(body, cache),
    )
    hidden, states = output.last_hidden_state, []
    if stateful:
        keys, values, states = take_keys(cache.layers, hidden.new_empty(len(hidden), 0, hidden.shape[1], 0))
    else:
        keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
    # On a CPU, attention of few queries is faster in float32 than in bfloat16, whatever the rest is faster in.
    latent = not stateful and are_latents(body.config.get_text_config(), keys[0])
    if latent:
        keys, values = expanded(body, cache)
    dtype = torch.float32 if prompt_ids.device.type == "cpu" else keys[0].dtype
    keys, values = ([piece.to(dtype) for piece in pieces] for pieces in (keys, values))
    # A copy of the last position alone, so that the other positions are freed.
    return PromptCache(keys, values, prompt_mask, states, latent), hidden[:, -1].clone()


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


class Wave:
    """Rows that are decoded together: R rows that continue B prompts, and what is known of them between two steps."""

    def __init__(
        self,
        body: nn.Module,
        logits_of: Callable[[Tensor], Tensor],
        *,
        prompt: PromptCache,
        last_hidden: Tensor,
        prompt_index: Tensor,
        row_ids: Tensor,
        sampling: SamplingOptions,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
        out: Completions,
    ) -> None:
        """`body` runs `shared_prefix_attention`; `logits_of` takes hidden states [R, H] to float32 logits [R, V].

        `last_hidden` [B, H] and `prompt` come from `prefill`; `prompt_index` [R] is sorted; `row_ids` [R] count the
        random numbers; completions go into `out`.
        """
        self.body, self.logits_of, self.prompt, self.prompt_index = body, logits_of, prompt, prompt_index
        self.sampling, self.seed, self.pad_token_id, self.out = sampling, seed, pad_token_id, out
        self.ends = torch.tensor(list(eos_token_ids), dtype=torch.long, device=row_ids.device)
        self.row_ids, self.rows = row_ids, torch.arange(row_ids.numel(), device=row_ids.device)
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)
        self.positions = prompt.mask.sum(-1)[prompt_index]  # of the first completion token
        self.logits = logits_of(last_hidden)[prompt_index]

    def draw(self, step: int | Tensor) -> Tensor:
        """Draws and stores the token of every row at completion position `step`; returns them [R]."""
        warp = self.sampling.warp()
        drawn = sample(self.logits, **warp, seed=self.seed, step=step, row_ids=self.row_ids)
        return self.out.write(step, self.rows, drawn, self.ended, self.ends, self.pad_token_id)

    def next_logits(self, cache: DecodeCache, token_ids: Tensor, step: int | Tensor) -> Tensor:
        return self.logits_of(decode_step(self.body, cache, token_ids, self.positions + step))

    def keep(self, kept: Tensor) -> None:
        """Goes on with the rows of the sorted index `kept` only."""
        self.row_ids, self.rows, self.ended = self.row_ids[kept], self.rows[kept], self.ended[kept]
        self.positions = self.positions[kept]


def decode(wave: Wave) -> None:
    """Runs a wave to its end, dropping finished rows as they come; on a CPU, where looking is free, at every step."""
    length = wave.sampling.max_new_tokens
    cache = DecodeCache(wave.prompt, wave.prompt_index, length)
    look_every = 1 if wave.rows.device.type == "cpu" else CHECK_EVERY
    for step in range(length):
        token_ids = wave.draw(step)
        if step + 1 == length:
            return
        rows = alive = wave.rows.numel()
        if (step + 1) % look_every == 0:
            alive -= int(wave.ended.sum())
        if alive == 0:
            return
        if alive < COMPACT_BELOW * rows:
            kept = (~wave.ended).nonzero().squeeze(1)
            cache.keep(kept)
            wave.keep(kept)
            token_ids = token_ids[kept]
        wave.logits = wave.next_logits(cache, token_ids, step)


def decode_static(wave: Wave) -> None:
    """Runs a wave to its end in steps of fixed shape, on CUDA as replayed graphs.

    The end is looked for every CHECK_EVERY steps. A graph serves until rows are dropped, down to a bucket of rows, or,
    unless attention follows the position by itself, until it must see more completion slots; the step before a capture
    runs as usual and warms it up.
    """
    length = wave.sampling.max_new_tokens
    cache = StaticDecodeCache(wave.prompt, wave.prompt_index, length)
    position = torch.zeros(1, dtype=torch.long, device=wave.rows.device)

    def one_step() -> None:
        token_ids, cache.ended = wave.draw(position), wave.ended
        wave.logits.copy_(wave.next_logits(cache, token_ids, position))
        position.add_(1)

    replay, shown = None, length if cache.fused else 0
    for step in range(length - 1):
        if step == shown:
            shown += SLOTS_SHOWN
            cache.show(shown)
            replay = None
        if step % CHECK_EVERY == 0 and step > 0:
            alive = wave.rows.numel() - int(wave.ended.sum())
            if alive == 0:
                return
            bucket = next(size for size in ROW_BUCKETS if size >= min(alive, ROW_BUCKETS[-1]))
            if alive <= bucket < wave.rows.numel():
                replay = None
                kept = wave.ended.int().argsort(stable=True)[:bucket].sort().values
                cache.length = step
                cache.keep(kept)
                wave.keep(kept)
                wave.logits = wave.logits[kept]
        if replay is None:
            one_step()
            replay = capture(one_step, position.device)
        else:
            replay()
    wave.draw(length - 1)


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On CUDA, records what `step` launches, without running it, and returns what repeats it; elsewhere `step`."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def decode_step(body: nn.Module, cache: DecodeCache, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Feeds one token a row, int64 [R] at `positions` [R]; returns the hidden states [R, H] that predict the next."""
    output = body(
        input_ids=token_ids[:, None],
        position_ids=positions[:, None],
        use_cache=True,
        decode_cache=cache,
        **cache_argument(body, cache),
    )
    cache.advance()
    return output.last_hidden_state[:, -1]
