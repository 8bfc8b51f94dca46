"""The native engine: our own decode loop behind `generate(custom_generate=...)`, prompts computed once.

One `generate` call makes all rollouts, in as many waves as the memory allows. Buffers and captured steps stay for the
run, for all its seeds and lengths; they grow with what is asked, and go when memory runs out.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.models import attention_as, split_head, tensors_of
from distill.rollout.decode import Completions, Decoder, decode_step
from distill.rollout.engine import RolloutEngine
from distill.rollout.kv_cache import ATTENTION_NAME, PromptCache, Room
from distill.rollout.prefill import prefill
from distill.rollout.waves import cut_waves, wave_bytes
from distill.runtime import free_bytes

# Room for completions and prompts grows by so many tokens, so that it seldom does.
ROOM_STEP = 64


class NativeEngine(RolloutEngine):
    """For models whose layers keep the keys and values of every position or a state; choice.py tells which do."""

    engine = "native"
    step, repeats = staticmethod(decode_step), False
    """What a step does with the body, and whether it is captured."""

    def __init__(self, model: PreTrainedModel, *, memory_budget_bytes: int | None = None, **options: Any) -> None:
        """`memory_budget_bytes` bounds what a wave of rows may take beside the weights; None takes half of the rest."""
        super().__init__(model, pack=True, **options)
        self._memory_budget_bytes = memory_budget_bytes
        self.body, self._head = split_head(self._model)
        one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            prompt, _ = prefill(self.body, one, torch.ones_like(one, dtype=torch.bool))
        self._token_bytes = sum(piece.nbytes for piece in (*prompt.keys, *prompt.values))
        self._state_bytes = sum(state.nbytes for state in tensors_of(prompt.states))
        self._kept = SimpleNamespace(decoder=None, stays=True)  # one for all variants of the engine
        self.limits.releases.append(WeakMethod(self.release))

    def _run(self, prompt_ids: Tensor, prompt_mask: Tensor, row_ids: Tensor, out: Completions) -> None:
        def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            num_rollouts = row_ids.numel() // input_ids.shape[0]
            for prompts, waves, columns in self._waves(*input_ids.shape, num_rollouts):
                self._rows_at_once = max(rows.stop - rows.start for rows in waves)
                with torch.compiler.set_stance("force_eager"):  # a cache that grows is compiled anew for each length
                    prompt, last_hidden = prefill(self.body, input_ids[prompts], prompt_mask[prompts], columns)
                decoder = self._decoder(prompt, self._rows_at_once)
                for rows in waves:
                    index = torch.arange(rows.start, rows.stop, device=input_ids.device) // num_rollouts - prompts.start
                    kept = {"seed": self.seed, "length": self.sampling.max_new_tokens, "rows_a_prompt": num_rollouts}
                    with attention_as(self.body, ATTENTION_NAME):
                        made = decoder.run(prompt, last_hidden, index, row_ids[rows], **kept)
                    for buffer, found in zip(out, made, strict=True):
                        buffer[rows] = found
            if not self._kept.stays:
                self._kept.decoder = None
            return out.token_ids

        self._generate(prompt_ids, prompt_mask, custom_generate=loop)

    def _decoder(self, prompt: PromptCache, rows: int) -> Decoder:
        """One with room for these prompts and rows: the one there is, if it has."""
        B, P = prompt.mask.shape
        kept, needed = self._kept.decoder, Room(B, P, rows, self.sampling.max_new_tokens)
        if kept and kept.warp == self.sampling.warp() and kept.cache.room.grown(needed) == kept.cache.room:
            return kept
        room = needed._replace(prompt_tokens=-(-P // ROOM_STEP) * ROOM_STEP)
        room = room if kept is None else room.grown(kept.cache.room)
        self._kept.decoder = kept = None  # before another takes the memory
        self._kept.decoder = Decoder(
            partial(self.step, self.body),
            self._logits,
            like=prompt,
            room=room if room.positions * self._token_bytes <= self._budget() else needed,
            sampling=self.sampling,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            repeat=self.repeats,
        )
        return self._kept.decoder

    def _logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [R, H] to float32 logits [R, V]."""
        products = self._model.get_output_embeddings()(hidden).float()
        return self._head.finished(products)[:, : self.vocab_size]

    def release(self, phase: str = "rollout") -> str | None:
        """Gives back the memory kept between batches, and says so if there was any; for good where `phase` is another's
        need.
        """
        self._kept.stays &= phase == "rollout"
        held, self._kept.decoder = self._kept.decoder, None
        return None if held is None else "what was kept for the next rollouts given back"

    def _budget(self) -> int:
        """Bytes that a wave may take, of which what is kept between batches is a part."""
        if self._memory_budget_bytes is not None:
            return self._memory_budget_bytes
        kept = self._kept.decoder
        held = 0 if kept is None else kept.cache.room.positions * self._token_bytes
        return (free_bytes(self._model.device) + held) // 2

    def _waves(self, prompts: int, P: int, num_rollouts: int) -> Iterator[tuple[slice, list[slice], int]]:
        """See `cut_waves`; with how many of the prompts' columns run at once."""
        budget = self._budget()
        needed = wave_bytes(
            self._model.config.get_text_config(),
            self._copy.dtype.itemsize,
            self._token_bytes,
            state_bytes=self._state_bytes,
            prompt_length=P,
            max_new_tokens=self.sampling.max_new_tokens,
        )
        for block, waves in cut_waves(prompts, num_rollouts, budget, needed, self.limits.rows_per_wave):
            rows = max(wave.stop - wave.start for wave in waves)
            yield block, waves, needed.columns_within(budget, block.stop - block.start, rows)
