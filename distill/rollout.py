"""Rollouts: N completions of each of B prompts from one `generate` call.

`RolloutEngine` prepares a generation copy of the student once and keeps it current. Its native engine is our own
decode loop (`distill.decode`) behind `generate(custom_generate=...)`; the transformers engine is the stock loop with
the same sampler plugged in, for models that the native loop refuses and for comparison.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from distill.decode import (
    Completions,
    SamplingOptions,
    Wave,
    decode,
    decode_static,
    decode_step,
    fits_static,
    prefill,
)
from distill.generation_copy import GenerationCopy, choose_dtype
from distill.kv_cache import ATTENTION_NAME, DecodeCache
from distill.memory import MemoryLimits, cut_waves, even_parts, free_bytes, wave_bytes
from distill.models import split_head
from distill_kernels import sample

# Rollouts of a prompt are told apart in the counter of the random numbers by this many ids a prompt.
ROW_IDS_PER_PROMPT = 65_536


@dataclass(frozen=True)
class Rollouts:
    """R = B·N completions, prompt-major: row r continues prompt r // N. Log-probabilities in nats."""

    prompt_ids: Tensor
    """[B, P] int64, left-padded."""
    prompt_mask: Tensor
    """[B, P] bool, true where there is a token."""
    completion_ids: Tensor
    """[R, T] int64, right-padded."""
    completion_lengths: Tensor
    """[R] int64; the sampled end-of-sequence token counts, nothing after it does."""
    logprob: Tensor
    """[R, T] float32: of the plain softmax of the student at sampling; 0 in the padding."""
    sampling_logprob: Tensor
    """[R, T] float32: of the distribution that was sampled from; 0 in the padding."""
    finished: Tensor
    """[R] bool: ended by an end-of-sequence token, not cut by length."""
    num_rollouts: int
    """N."""

    @property
    def prompt_index(self) -> Tensor:
        """[R] int64: the prompt that each row continues."""
        return torch.arange(self.completion_ids.shape[0], device=self.completion_ids.device) // self.num_rollouts

    @property
    def completion_mask(self) -> Tensor:
        """[R, T] bool, true where there is a completion token."""
        positions = torch.arange(self.completion_ids.shape[1], device=self.completion_ids.device)
        return positions < self.completion_lengths[:, None]

    def select(self, prompts: slice) -> "Rollouts":
        """The rollouts of some prompts, without the columns that are padding in all of them."""
        start, stop, step = prompts.indices(self.prompt_ids.shape[0])
        if step != 1 or stop <= start:
            raise ValueError(f"select needs a non-empty range of prompts, got {prompts}")
        rows = slice(start * self.num_rollouts, stop * self.num_rollouts)
        mask = self.prompt_mask[start:stop]
        first = int(mask.any(0).int().argmax())
        length = int(self.completion_lengths[rows].max())
        return Rollouts(
            self.prompt_ids[start:stop, first:],
            mask[:, first:],
            self.completion_ids[rows, :length],
            self.completion_lengths[rows],
            self.logprob[rows, :length],
            self.sampling_logprob[rows, :length],
            self.finished[rows],
            self.num_rollouts,
        )


class RolloutEngine:
    """Makes rollouts of one student; `refresh` after its weights have changed."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        sampling: SamplingOptions,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
        precision: str = "auto",
        engine: str = "native",
        memory_budget_bytes: int | None = None,
        vocab_size: int | None = None,
        limits: MemoryLimits | None = None,
    ) -> None:
        """`precision` is `auto`, `float32` or `bfloat16`; `engine` is `native` or `transformers`.

        `memory_budget_bytes` bounds what a wave of rows may take beside the weights; None takes half of what is free.
        `vocab_size` leaves out the padded columns past the tokenizer. `limits` is where the number of rows that are
        sampled at once is kept when memory runs out.
        Raises `NotImplementedError` for a model whose attention the native engine cannot run.
        """
        self.sampling, self.seed, self.engine = sampling, seed, engine
        self.eos_token_ids, self.pad_token_id = tuple(eos_token_ids), pad_token_id
        self._memory_budget_bytes = memory_budget_bytes
        self.limits, self._rows_at_once = limits or MemoryLimits(1), 1
        if engine == "native" and (reason := native_refusal(model)):
            raise NotImplementedError(f"rollout.engine native: {reason}; set rollout.engine: transformers")
        dtype = choose_dtype(model, precision)
        static = model.device.type == "cuda" and fits_static(model.config.get_text_config())
        self._decode = decode_static if static else decode
        self._copy = GenerationCopy(
            model, dtype, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id, pack=engine == "native"
        )
        self._model = self._copy.model
        self._prefill_attention = self._model.config._attn_implementation
        self._body, head = split_head(self._model)
        self._scale, self._softcap, self._vocab_size = head.scale, head.softcap, vocab_size
        if engine == "native":
            with torch.no_grad():
                self._token_bytes = self._probe()

    @property
    def precision(self) -> str:
        """The precision in use, `float32` or `bfloat16`."""
        return str(self._copy.dtype).removeprefix("torch.")

    def refresh(self) -> None:
        """Says that the student's weights have changed; they are copied when they are next needed."""
        self._copy.stale = True

    def variant(self, *, seed: int, max_new_tokens: int) -> "RolloutEngine":
        """The same engine, weights included, with another seed and length: for evaluations between two steps."""
        other = copy.copy(self)
        other.seed, other.sampling = seed, dataclasses.replace(self.sampling, max_new_tokens=max_new_tokens)
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
        run = self._run_native if self.engine == "native" else self._run_transformers

        def draw() -> Completions:
            if self._copy.stale:
                self._copy.refresh()
            out = Completions.empty(row_ids.numel(), self.sampling.max_new_tokens, self.pad_token_id, device)
            run(prompt_ids, prompt_mask, row_ids, out)
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

    def _sample_fewer(self) -> str | None:
        if self._rows_at_once == 1:
            return None
        self.limits.rows_per_wave = self._rows_at_once // 2
        return f"{self.limits.rows_per_wave} rollouts at once"

    def _run_native(self, prompt_ids: Tensor, prompt_mask: Tensor, row_ids: Tensor, out: Completions) -> None:
        """One `generate` call whose loop is ours, in as many waves as the memory budget asks for."""

        def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            num_rollouts = row_ids.numel() // input_ids.shape[0]
            for prompts, waves in self._waves(*input_ids.shape, num_rollouts):
                self._rows_at_once = max(rows.stop - rows.start for rows in waves)
                self._set_attention(self._prefill_attention)
                cache, last_hidden = prefill(self._body, input_ids[prompts], prompt_mask[prompts])
                self._set_attention(ATTENTION_NAME)
                for rows in waves:
                    index = torch.arange(rows.start, rows.stop, device=input_ids.device) // num_rollouts - prompts.start
                    wave = Wave(
                        self._body,
                        self._logits,
                        prompt=cache,
                        last_hidden=last_hidden,
                        prompt_index=index,
                        row_ids=row_ids[rows],
                        sampling=self.sampling,
                        eos_token_ids=self.eos_token_ids,
                        pad_token_id=self.pad_token_id,
                        seed=self.seed,
                        out=Completions(*(tensor[rows] for tensor in out)),
                    )
                    self._decode(wave)
            return out.token_ids

        try:
            self._generate(prompt_ids, prompt_mask, custom_generate=loop)
        finally:
            self._set_attention(self._prefill_attention)

    def _run_transformers(self, prompt_ids: Tensor, prompt_mask: Tensor, row_ids: Tensor, out: Completions) -> None:
        """The stock loop over every row with its own prompt; a logits processor draws and hides all other tokens."""
        R = row_ids.numel()
        prompt_index = torch.arange(R, device=row_ids.device) // (R // prompt_ids.shape[0])
        for start, stop in even_parts(R, min(R, self.limits.rows_per_wave or R)):
            rows, self._rows_at_once = slice(start, stop), stop - start
            part = Completions(*(tensor[rows] for tensor in out))
            self._generate(
                prompt_ids[prompt_index[rows]],
                prompt_mask[prompt_index[rows]],
                logits_processor=LogitsProcessorList([_Drawing(self, prompt_ids.shape[1], row_ids[rows], part)]),
            )

    def _generate(self, prompt_ids: Tensor, prompt_mask: Tensor, **options) -> None:
        self._model.generate(
            prompt_ids,
            attention_mask=prompt_mask.long(),
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,
            **options,
        )

    def _set_attention(self, name: str) -> None:
        self._model.config.get_text_config()._attn_implementation = name

    def _logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [R, H] to float32 logits [R, V]."""
        logits = self._model.get_output_embeddings()(hidden).float()
        if self._scale != 1:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits[:, : self._vocab_size]

    def _waves(self, prompts: int, prompt_length: int, num_rollouts: int) -> Iterator[tuple[slice, list[slice]]]:
        """See `cut_waves`."""
        budget = free_bytes(self._model.device) // 2 if self._memory_budget_bytes is None else self._memory_budget_bytes
        needed = wave_bytes(
            self._model.config.get_text_config(),
            self._copy.dtype.itemsize,
            self._token_bytes,
            prompt_length=prompt_length,
            num_rollouts=num_rollouts,
            max_new_tokens=self.sampling.max_new_tokens,
        )
        return cut_waves(prompts, num_rollouts, budget, *needed, self.limits.rows_per_wave)

    def _probe(self) -> int:
        """Checks a decode step against the model's own forward; returns the bytes of a token's keys and values.

        Raises `NotImplementedError` when they disagree.
        """
        token_ids = torch.arange(4, device=self._model.device)[None]
        body, everything = self._body, torch.ones_like(token_ids, dtype=torch.bool)
        _, expected = prefill(body, token_ids, everything)
        prompt, _ = prefill(body, token_ids[:, :-1], everything[:, :-1])
        self._set_attention(ATTENTION_NAME)
        try:
            hidden = decode_step(
                body,
                DecodeCache(prompt, token_ids.new_zeros(2), 2),
                token_ids[0, -1:].expand(2),
                token_ids.new_full((2,), 3),
            )
        finally:
            self._set_attention(self._prefill_attention)
        tolerance = 0.1 if self._copy.dtype == torch.bfloat16 else 1e-3
        error = float((hidden - expected).abs().max() / expected.abs().max())
        if not error < tolerance:
            raise NotImplementedError(
                f"rollout.engine native: a decode step is off by {error:.1e} from the model's own forward, "
                f"so its attention is of a kind the native engine cannot run; set rollout.engine: transformers"
            )
        return sum(piece[0, :, 0].nbytes for piece in (*prompt.keys, *prompt.values))


class _Drawing(LogitsProcessor):
    """Draws each step's tokens like the native loop does, and masks every other token out of the scores."""

    def __init__(self, engine: RolloutEngine, prompt_length: int, row_ids: Tensor, out: Completions) -> None:
        self._engine, self._prompt_length, self._row_ids, self._out = engine, prompt_length, row_ids, out
        self._rows = torch.arange(row_ids.numel(), device=row_ids.device)
        self._ended = torch.zeros_like(self._rows, dtype=torch.bool)
        self._ends = torch.tensor(engine.eos_token_ids, dtype=torch.long, device=row_ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        engine, step = self._engine, input_ids.shape[1] - self._prompt_length
        logits = scores[:, : engine._vocab_size]
        drawn = sample(logits, **engine.sampling.warp(), seed=engine.seed, step=step, row_ids=self._row_ids)
        token_ids = self._out.write(step, self._rows, drawn, self._ended, self._ends, engine.pad_token_id)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_ids[:, None], 0.0)


def native_refusal(model: PreTrainedModel) -> str | None:
    """Why the native engine cannot decode this model, or None as far as its configuration tells."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if config.is_encoder_decoder:
        return "an encoder-decoder has no prompt cache of the causal kind"
    if kinds:
        return f"layers of the kinds {sorted(kinds)} keep no keys and values of every position"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers share one another's keys and values"
    if getattr(config, "attn_logit_softcapping", None):
        return "attention scores are soft-capped"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} computes attention itself and takes no other function for it"
    return None
