"""The native engine: our own decode loop behind `generate(custom_generate=...)`, prompts computed once.

One `generate` call makes all rollouts, in as many waves as the memory allows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.models import attention_as, fits_static, split_head, tensors_of
from distill.rollout.decode import Completions, Wave, decode, decode_static, prefill
from distill.rollout.engine import RolloutEngine
from distill.rollout.kv_cache import ATTENTION_NAME
from distill.rollout.waves import cut_waves, wave_bytes
from distill.runtime import free_bytes


class NativeEngine(RolloutEngine):
    """For models whose layers keep the keys and values of every position or a state; choice.py tells which do."""

    engine = "native"

    def __init__(self, model: PreTrainedModel, *, memory_budget_bytes: int | None = None, **options: Any) -> None:
        """`memory_budget_bytes` bounds what a wave of rows may take beside the weights; None takes half of the rest."""
        super().__init__(model, pack=True, **options)
        self._memory_budget_bytes = memory_budget_bytes
        static = model.device.type == "cuda" and fits_static(model.config.get_text_config())
        self._decode = decode_static if static else decode
        self.body, self._head = split_head(self._model)
        one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            prompt, _ = prefill(self.body, one, torch.ones_like(one, dtype=torch.bool))
        self._token_bytes = sum(piece.nbytes for piece in (*prompt.keys, *prompt.values))
        self._state_bytes = sum(state.nbytes for state in tensors_of(prompt.states))

    def _run(self, prompt_ids: Tensor, prompt_mask: Tensor, row_ids: Tensor, out: Completions) -> None:
        def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            num_rollouts = row_ids.numel() // input_ids.shape[0]
            for prompts, waves in self._waves(*input_ids.shape, num_rollouts):
                self._rows_at_once = max(rows.stop - rows.start for rows in waves)
                with torch.compiler.set_stance("force_eager"):  # a cache that grows is compiled anew for each length
                    cache, last_hidden = prefill(self.body, input_ids[prompts], prompt_mask[prompts])
                for rows in waves:
                    index = torch.arange(rows.start, rows.stop, device=input_ids.device) // num_rollouts - prompts.start
                    wave = Wave(
                        self.body,
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
                    with attention_as(self.body, ATTENTION_NAME):
                        self._decode(wave)
            return out.token_ids

        self._generate(prompt_ids, prompt_mask, custom_generate=loop)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [R, H] to float32 logits [R, V]."""
        products = self._model.get_output_embeddings()(hidden).float()
        return self._head.finished(products)[:, : self.vocab_size]

    def _waves(self, prompts: int, prompt_length: int, num_rollouts: int) -> Iterator[tuple[slice, list[slice]]]:
        """See `cut_waves`."""
        budget = free_bytes(self._model.device) // 2 if self._memory_budget_bytes is None else self._memory_budget_bytes
        needed = wave_bytes(
            self._model.config.get_text_config(),
            self._copy.dtype.itemsize,
            self._token_bytes,
            state_bytes=self._state_bytes,
            prompt_length=prompt_length,
            num_rollouts=num_rollouts,
            max_new_tokens=self.sampling.max_new_tokens,
        )
        return cut_waves(prompts, num_rollouts, budget, *needed, self.limits.rows_per_wave)
