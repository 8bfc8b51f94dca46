"""The stock engine: the loop of transformers with our sampler plugged in, a row for each rollout with its own prompt.

For models that the native loop refuses, and for comparison.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from distill.rollout.decode import Completions
from distill.rollout.engine import RolloutEngine
from distill.rollout.waves import even_parts
from distill_kernels import sample


class StockEngine(RolloutEngine):
    """Draws what the native engine draws, from `generate` as it is."""

    engine = "transformers"

    def _run(self, prompt_ids: Tensor, prompt_mask: Tensor, row_ids: Tensor, out: Completions) -> None:
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
