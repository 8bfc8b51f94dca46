"""The stock engine: the loop of transformers with our sampler plugged in, a row for each rollout with its own prompt.

For models that the native loop refuses, and for comparison. A model may take no notice of padding on the left, or of
the attention mask at all: a probe finds out, and then only prompts of one length are sampled together.
"""

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from distill.models import ModelError, split_head
from distill.rollout.decode import Completions
from distill.rollout.engine import RolloutEngine
from distill.rollout.waves import even_parts
from distill.runtime import is_out_of_memory
from distill_kernels import sample

# What the log-probabilities of a sampled token may differ by, in nats: sampled in steps, and scored in one forward.
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.5  # of float32, and of what has fewer digits
PROBE_LENGTHS, PROBE_ROLLOUTS, PROBE_STEPS = (7, 4), 2, 4


class StockEngine(RolloutEngine):
    """Draws what the native engine draws, from `generate` as it is."""

    engine = "transformers"
    one_length = False
    """Whether only prompts of one length are sampled together."""

    def sees_padding(self) -> bool:
        """Whether a row says something else for the padding on its left. Raises `ModelError` for a model whose
        `generate` fails, or samples from something else than its forward.
        """
        tried = copy.copy(self)
        allowed = TOLERANCE if self._copy.dtype == torch.float32 else ROUNDED_TOLERANCE
        try:
            error = tried._probe()
            if not error < allowed:
                tried.one_length = True
                error = tried._probe()
        # What a model that is no decoder makes of prompts is open-ended.
        except Exception as failure:
            if is_out_of_memory(failure):
                raise
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())
            raise ModelError(f"{self._named()} cannot be sampled from: {reason:.300}") from failure
        if not error < allowed:
            raise ModelError(
                f"{self._named()} cannot be sampled from: the log-probabilities of what `generate` samples are off by "
                f"{error:.1e} nats from those of the model's own forward"
            )
        return tried.one_length

    def _named(self) -> str:
        return f"model type {self._model.config.model_type!r}"

    @torch.no_grad()
    def _probe(self) -> float:
        """How far recorded log-probabilities of some completions are from those of the forward, row by row."""
        device, longest = self._model.device, max(PROBE_LENGTHS)
        lengths = torch.tensor(PROBE_LENGTHS, device=device)
        mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
        ids = torch.arange(1, mask.numel() + 1, device=device).view_as(mask)
        probe = self.variant(seed=0, max_new_tokens=PROBE_STEPS)
        keys = torch.arange(len(lengths), device=device)
        found = probe.generate(ids, mask, num_rollouts=PROBE_ROLLOUTS, prompt_keys=keys)
        body, head = split_head(self._model, self.vocab_size)
        errors = []
        for row, length in enumerate(found.completion_lengths.tolist()):
            prompt, tokens = row // PROBE_ROLLOUTS, found.completion_ids[row, :length]
            whole = torch.cat([ids[prompt][mask[prompt]], tokens])
            hidden = body(input_ids=whole[None], use_cache=False).last_hidden_state[0]
            logprob = head.logits(hidden)[-len(tokens) - 1 : -1].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            errors.append((logprob - found.logprob[row, :length]).abs().max())
        return float(torch.stack(errors).max())

    def _run(self, prompt_ids: Tensor, prompt_mask: Tensor, row_ids: Tensor, out: Completions) -> None:
        R = row_ids.numel()
        prompt_index = torch.arange(R, device=row_ids.device) // (R // prompt_ids.shape[0])
        for rows, length in self._waves(prompt_mask, R):
            self._rows_at_once = rows.stop - rows.start
            part = Completions(*(tensor[rows] for tensor in out))
            self._generate(
                prompt_ids[prompt_index[rows], -length:],
                prompt_mask[prompt_index[rows], -length:],
                logits_processor=LogitsProcessorList([_Drawing(self, length, row_ids[rows], part)]),
            )

    def _waves(self, prompt_mask: Tensor, rows: int) -> Iterator[tuple[slice, int]]:
        """Rows that are sampled together, and how many tokens their longest prompt has."""
        prompts, longest = prompt_mask.shape
        lengths = prompt_mask.sum(1).tolist() if self.one_length else [longest] * prompts
        first, a_prompt = 0, rows // prompts
        for length, alike in itertools.groupby(lengths):
            count = len(list(alike)) * a_prompt
            for start, stop in even_parts(count, min(count, self.limits.rows_per_wave or count)):
                yield slice(first + start, first + stop), length
            first += count


class _Drawing(LogitsProcessor):
    """Draws each step's tokens like the native loop does, and masks every other token out of the scores."""

    def __init__(self, engine: RolloutEngine, prompt_length: int, row_ids: Tensor, out: Completions) -> None:
        self._engine, self._prompt_length, self._row_ids, self._out = engine, prompt_length, row_ids, out
        self._rows = torch.arange(row_ids.numel(), device=row_ids.device)
        self._ended = torch.zeros_like(self._rows, dtype=torch.bool)
        self._ends = torch.tensor(engine.eos_token_ids, dtype=torch.long, device=row_ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        engine, step = self._engine, input_ids.shape[1] - self._prompt_length
        logits = scores[:, : engine.vocab_size]
        drawn = sample(logits, **engine.sampling.warp(), seed=engine.seed, step=step, row_ids=self._row_ids)
        token_ids = self._out.write(step, self._rows, drawn, self._ended, self._ends, engine.pad_token_id)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_ids[:, None], 0.0)
