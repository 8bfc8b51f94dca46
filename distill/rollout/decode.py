"""The decode loop behind `generate`: draw, stop, drop finished rows, feed.

Every token is drawn by `distill_kernels.sample` with random numbers that depend on (seed, row id, token position)
alone, so neither the wave a row ran in nor the rows beside it change what it says.
A step of fixed shape is captured once and repeated over batches, seeds and new weights (`distill_kernels.recording`):
all that changes from one to the next lies in the buffers of a `Decoder`.
Left out on purpose: penalties, beams, constraints. They would make the sampler differ from the scored policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.models import cache_argument
from distill.rollout.kv_cache import DecodeCache, PromptCache, Room
from distill_kernels import Sample, record_draw, sample
from distill_kernels.recording import capture

# On CUDA, where looking waits for the device: how often the end is looked for.
CHECK_EVERY = 16
# Rows are dropped down to one of these numbers, so that steps are captured for few of them. On a CPU a row more costs
# more, and dropping some costs about as much as one step.
CPU_LADDER = tuple(sorted({round(1.12**power) for power in range(90)}))
CUDA_LADDER = (1, *(rows for power in range(1, 13) for rows in (2**power, 3 * 2**power // 2)))


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
        return record_draw(drawn, step, rows, ended, ends, pad_token_id, **self._asdict())


class Decoder:
    """Decodes rows of one model, in buffers that stay from batch to batch."""

    def __init__(
        self,
        step: Callable[[DecodeCache, Tensor, Tensor], Tensor],
        logits_of: Callable[[Tensor], Tensor],
        *,
        like: PromptCache,
        room: Room,
        sampling: SamplingOptions,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        repeat: bool,
    ) -> None:
        """`step` is `decode_step` of a body, or what does the same; `logits_of` takes hidden states [R, H] to float32
        logits [R, V]. Buffers are for caches `like` one, and have `room`. `repeat` says whether steps may be captured.
        """
        self.step, self.logits_of, self.warp, self.pad_token_id = step, logits_of, sampling.warp(), pad_token_id
        self.cache, device = DecodeCache(like, room), like.mask.device
        self.ends = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
        self.seed = torch.zeros(1, dtype=torch.long, device=device)
        # By row: the number that its random numbers have, its place in `out`, the position of its first completion
        # token, and the token drawn last.
        self._row_ids, self._places, self._positions, self._token_ids = (
            torch.zeros(room.rows, dtype=torch.long, device=device) for _ in range(4)
        )
        self.out = Completions.empty(room.rows, room.tokens, pad_token_id, device)
        self._repeat, self._steps = repeat, {}
        self._pool = torch.cuda.graph_pool_handle() if repeat and device.type == "cuda" else None

    def run(
        self,
        prompt: PromptCache,
        last_hidden: Tensor,
        prompt_index: Tensor,
        row_ids: Tensor,
        *,
        seed: int,
        length: int,
        rows_a_prompt: int | None = None,
    ) -> Completions:
        """Up to `length` tokens for R rows; what they say is good until the next run.

        `prompt` and `last_hidden` [B, H] come from `prefill`; row r continues the prompt `prompt_index[r]` (sorted),
        which `rows_a_prompt` do at the most; `row_ids` [R] count the random numbers.
        """
        R = prompt_index.numel()
        self.cache.load(prompt, prompt_index, rows_a_prompt)
        self.seed.fill_(seed)
        self._row_ids[:R], self._places[:R] = row_ids, torch.arange(R, device=row_ids.device)
        self._positions[:R] = prompt.mask.sum(-1)[prompt_index]
        for buffer, nothing in zip(self.out, (self.pad_token_id, 0, 0, 0, False), strict=True):
            buffer.fill_(nothing)
        self._draw(self.logits_of(last_hidden)[prompt_index])
        self._go_on(length)
        return Completions(*(buffer[:R, :length] if buffer.dim() == 2 else buffer[:R] for buffer in self.out))

    def _go_on(self, length: int) -> None:
        """Steps until every row has ended, or has `length` tokens."""
        cache, on_cpu = self.cache, self.seed.device.type == "cpu"
        ladder = CPU_LADDER if on_cpu else CUDA_LADDER
        for step in range(1, length):
            if on_cpu or step % CHECK_EVERY == 0:
                alive = cache.rows - int(cache.ended[: cache.rows].sum())
                if alive == 0:
                    return
                rows = next((size for size in ladder if size >= alive), alive)
                if rows < cache.rows:
                    # Rows that go on, and as many of the others as are missing.
                    self._keep(cache.ended[: cache.rows].int().argsort(stable=True)[:rows].sort().values)
            self._advance()

    def _advance(self) -> None:
        """One step of all rows, captured when it is first taken for so many of them."""
        key = self.cache.rows, self.cache.rows_a_prompt
        if key in self._steps:
            self._steps[key]()
        elif self._repeat:
            self._steps[key] = capture(self._step, self.seed.device, self._pool)
        else:
            self._step()
        self.cache.length += 1

    def _step(self) -> None:
        """Feeds the tokens drawn last, and draws the next."""
        rows, position = self.cache.rows, self.cache.position
        hidden = self.step(self.cache, self._token_ids[:rows], self._positions[:rows] + position)
        position.add_(1)
        self._draw(self.logits_of(hidden))

    def _draw(self, logits: Tensor) -> None:
        rows, position, ended = self.cache.rows, self.cache.position, self.cache.ended[: self.cache.rows]
        drawn = sample(logits, **self.warp, seed=self.seed, step=position, row_ids=self._row_ids[:rows])
        places = self._places[:rows]
        self._token_ids[:rows] = self.out.write(position, places, drawn, ended, self.ends, self.pad_token_id)

    def _keep(self, rows: Tensor) -> None:
        """Goes on with the rows of the sorted index only."""
        self.cache.keep(rows)
        for buffer in (self._row_ids, self._places, self._positions, self._token_ids):
            buffer[: rows.numel()] = buffer[rows]


def decode_step(body: nn.Module, cache: DecodeCache, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Feeds one token a row, int64 [R] at `positions` [R]; returns the hidden states [R, H] that predict the next."""
    output = body(
        input_ids=token_ids[:, None],
        position_ids=positions[:, None],
        use_cache=True,
        decode_cache=cache,
        **cache_argument(body, cache),
    )
    return output.last_hidden_state[:, -1]
