"""Rollouts: N completions of each of B prompts from one `generate` call.

What every local engine has: a generation copy of the student, prepared once and kept current, and a batch that is
sampled again with fewer rows at a time when memory runs out. native.py has our own loop, stock.py that of transformers;
which of them a model gets, and in which precision, is decided in choice.py.
"""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.loss import Rollouts
from distill.models import WorkingCopy
from distill.rollout.decode import Completions, SamplingOptions
from distill.rollout.generation_copy import GenerationCopy
from distill.runtime import MemoryLimits

# Rollouts of a prompt are told apart in the counter of the random numbers by this many ids a prompt.
ROW_IDS_PER_PROMPT = 65_536


class RolloutEngine:
    """Makes rollouts of one student; `refresh` after its weights have changed."""

    engine: str
    """What `rollout.engine` calls it."""
    fallback: str | None = None
    """Why it stands in for the native engine, where `rollout.engine: auto` took it for that."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        sampling: SamplingOptions,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
        dtype: torch.dtype,
        vocab_size: int | None = None,
        limits: MemoryLimits | None = None,
        pack: bool = False,
        working: WorkingCopy | None = None,
    ) -> None:
        """`dtype` is what the copy computes in; `vocab_size` leaves out the padded columns past the tokenizer.

        `limits` is where the number of rows that are sampled at once is kept when memory runs out; `pack` lays the
        weights out for the small products of a decode step on a CPU; weights that `working` has in `dtype` are shared.
        """
        self.sampling, self.seed, self.vocab_size = sampling, seed, vocab_size
        self.eos_token_ids, self.pad_token_id = tuple(eos_token_ids), pad_token_id
        self.limits, self._rows_at_once = limits or MemoryLimits(1), 1
        self._copy = GenerationCopy(
            model, dtype, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id, pack=pack, working=working
        )
        self._model = self._copy.model

    @property
    def precision(self) -> str:
        """The precision in use, `float32` or `bfloat16`."""
        return str(self._copy.dtype).removeprefix("torch.")

    def refresh(self) -> None:
        """Says that the student's weights have changed; they are copied when they are next needed."""
        self._copy.stale = True

    def variant(self, *, seed: int, **sampling: float) -> "RolloutEngine":
        """The same engine, weights included, with another seed and these `SamplingOptions`: for evaluations."""
        other = copy.copy(self)
        other.seed, other.sampling = seed, dataclasses.replace(self.sampling, **sampling)
        return other

    @torch.no_grad()
    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, num_rollouts: int, prompt_keys: Tensor) -> Rollouts:
        """Samples `num_rollouts` completions of each prompt: int64 [B, P] left-padded, bool [B, P].

        What a rollout says depends on the seed, its prompt's key (int64 [B]), its number among the prompt's rollouts
        and the weights, not on the batch.
        """
        if not prompt_mask[:, -1].all():
            raise ValueError("prompts must be left-padded and not empty: the last column of prompt_mask has a hole")
        if not 1 <= num_rollouts <= ROW_IDS_PER_PROMPT:
            raise ValueError(f"num_rollouts must be from 1 to {ROW_IDS_PER_PROMPT}, got {num_rollouts}")
        device = prompt_ids.device
        numbers = torch.arange(num_rollouts, device=device)
        row_ids = (prompt_keys.to(device)[:, None] * ROW_IDS_PER_PROMPT + numbers).flatten()

        def draw() -> Completions:
            if self._copy.stale:
                self._copy.refresh()
            out = Completions.empty(row_ids.numel(), self.sampling.max_new_tokens, self.pad_token_id, device)
            self._run(prompt_ids, prompt_mask, row_ids, out)
            return out

        lower = "rollout.max_new_tokens or prompts.max_tokens, or set rollout.precision: bfloat16"
        out = self.limits.attempt("rollout", draw, self._sample_fewer, lower)
        length = int(out.lengths.max())
        return Rollouts(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=out.token_ids[:, :length],
            completion_lengths=out.lengths,
            logprob=out.logprob[:, :length],
            sampling_logprob=out.sampling_logprob[:, :length],
            finished=out.finished,
            num_rollouts=num_rollouts,
        )

    def _run(self, prompt_ids: Tensor, prompt_mask: Tensor, row_ids: Tensor, out: Completions) -> None:
        """Fills `out` with a completion for each of `row_ids` [R], prompt-major; keeps `_rows_at_once` up to date."""
        raise NotImplementedError

    def _sample_fewer(self) -> str | None:
        if self._rows_at_once == 1:
            return None
        self.limits.rows_per_wave = self._rows_at_once // 2
        return f"{self.limits.rows_per_wave} rollouts at once"

    def _generate(self, prompt_ids: Tensor, prompt_mask: Tensor, **options) -> None:
        self._model.generate(
            prompt_ids,
            attention_mask=prompt_mask.long(),
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,
            **options,
        )
