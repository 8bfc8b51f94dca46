"""`rollout.engine: vllm`: rollouts from a vLLM server that is given the student's weights again after each step.

A request for each prompt, all under way at once: the server makes one batch of them, and only so has each prompt a seed
of its own. Prompts travel as token ids, so the chat template is always ours. The weights go through a folder that both
processes see; a probe, the log-probabilities of a fixed text, shows before each batch that the server uses them.
Left out on purpose: an engine in this process, since vLLM pins other versions of torch and transformers.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.loss import Rollouts
from distill.rollout.decode import Completions, SamplingOptions
from distill.rollout.served_weights import ServedWeights
from distill.servers import ServerError, UnavailableError, in_parallel


class VllmEngine:
    """Makes rollouts of one student like `RolloutEngine`; `refresh` after its weights have changed."""

    engine = "vllm"

    def __init__(
        self,
        model: PreTrainedModel,
        weights: ServedWeights,
        *,
        sampling: SamplingOptions,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
        vocab_size: int,
        corrects_sampler: bool,
    ) -> None:
        """`corrects_sampler`: the loss needs log-probabilities of the distribution sampled from, not the plain ones.

        Raises `ServerError` where the two differ and the server gives the other.
        """
        self.model, self.weights, self.server = model, weights, weights.server
        self.sampling, self.seed, self.vocab_size = sampling, seed, vocab_size
        self.eos_token_ids, self.pad_token_id = list(eos_token_ids), pad_token_id
        self._background, self._under_way = ThreadPoolExecutor(1), [Future()]
        self._under_way[0].set_result(None)
        self._plain = sampling.warp() == SamplingOptions(1).warp()
        needed = "processed_logprobs" if corrects_sampler else "raw_logprobs"
        given = weights.logprobs_mode
        if not given.endswith("_logprobs") or (given != needed and not self._plain):
            raise ServerError(f"{self.server}: gives {given}, and this run needs --logprobs-mode {needed}")

    @property
    def precision(self) -> str:
        """The precision in use, the server's."""
        return self.weights.precision

    def refresh(self) -> None:
        """Says that the student's weights have changed; the server gets them when they are next needed."""
        self.weights.stale = True

    def variant(self, *, seed: int, **sampling: float) -> "VllmEngine":
        """The same engine, weights included, with another seed and these `SamplingOptions`: for evaluations."""
        other = copy.copy(self)
        other.seed, other.sampling = seed, dataclasses.replace(self.sampling, **sampling)
        other._plain = other.sampling.warp() == SamplingOptions(1).warp()
        return other

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, num_rollouts: int, prompt_keys: Tensor) -> Rollouts:
        """Samples `num_rollouts` completions of each prompt: int64 [B, P] left-padded, bool [B, P].

        What a rollout says depends on the seed, its prompt's key (int64 [B]), its number among the prompt's rollouts
        and the weights; of the batch it depends as far as the server's arithmetic does. A server that went away
        meanwhile gets the weights and the whole batch again.
        """
        return self.begin(prompt_ids, prompt_mask, num_rollouts=num_rollouts, prompt_keys=prompt_keys).result()

    def begin(
        self, prompt_ids: Tensor, prompt_mask: Tensor, *, num_rollouts: int, prompt_keys: Tensor
    ) -> "Future[Rollouts]":
        """`generate` in the background, from the weights of now whatever becomes of them; one batch at a time."""
        self.settle()
        self.weights.snapshot(self.model)
        self._under_way[0] = self._background.submit(self._complete, prompt_ids, prompt_mask, num_rollouts, prompt_keys)
        return self._under_way[0]

    def settle(self) -> None:
        """Waits for the batch under way, which may still need the snapshot that there is."""
        wait(self._under_way)

    def _complete(self, prompt_ids: Tensor, prompt_mask: Tensor, num_rollouts: int, prompt_keys: Tensor) -> Rollouts:
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
        bodies = [self._body(ids, key, num_rollouts) for ids, key in zip(prompts, prompt_keys.tolist(), strict=True)]

        def attempt() -> list[dict[str, Any]]:
            try:
                self.weights.ensure()
                return in_parallel(lambda body: self.server.request("/v1/completions", body), bodies)
            except UnavailableError:
                self.weights.loaded = False
                raise

        choices = [choice for answer in self.server.again(attempt) for choice in _in_order(answer)]
        rows = [self._read(choice) for choice in choices]
        if len(rows) != len(prompts) * num_rollouts:
            raise ServerError(f"{self.server}: gave {len(rows)} of {len(prompts) * num_rollouts} completions")
        device, longest = prompt_ids.device, max(len(ids) for ids, _ in rows)
        out = Completions.empty(len(rows), longest, self.pad_token_id, torch.device("cpu"))
        for row, (ids, logprobs) in enumerate(rows):
            out.token_ids[row, : len(ids)], out.logprob[row, : len(ids)] = torch.tensor(ids), torch.tensor(logprobs)
            out.lengths[row], out.finished[row] = len(ids), ids[-1] in self.eos_token_ids
        unknown = torch.full_like(out.logprob, torch.nan).masked_fill(out.logprob == 0, 0)
        raw = self.weights.logprobs_mode == "raw_logprobs"
        # A checkpoint takes no two tensors of one memory.
        sampling_logprob = out.logprob.clone() if self._plain or not raw else unknown
        return Rollouts(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=out.token_ids.to(device),
            completion_lengths=out.lengths.to(device),
            logprob=(out.logprob if raw or self._plain else unknown).to(device),
            sampling_logprob=sampling_logprob.to(device),
            finished=out.finished.to(device),
            num_rollouts=num_rollouts,
        )

    def _body(self, token_ids: list[int], key: int, num_rollouts: int) -> dict[str, Any]:
        digest = hashlib.blake2b(f"{self.seed} {key}".encode(), digest_size=7).digest()
        padded = range(self.vocab_size, self.model.config.get_text_config().vocab_size)
        return {
            "model": self.weights.name,
            "prompt": token_ids,
            "n": num_rollouts,  # the server adds a rollout's number to the seed
            "seed": int.from_bytes(digest),
            "max_tokens": self.sampling.max_new_tokens,
            **self.sampling.warp(),
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "ignore_eos": True,  # it may know of one only: ours are these
            "stop_token_ids": self.eos_token_ids,
            "logit_bias": {str(token): -100 for token in padded} or None,
        }

    def _read(self, choice: dict[str, Any]) -> tuple[list[int], list[float]]:
        """A completion's token ids and their log-probabilities."""
        try:
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            if len(ids) != len(logprobs) or not ids or max(ids) >= self.vocab_size:
                raise ValueError
            return ids, [float(value) for value in logprobs]
        except (KeyError, TypeError, ValueError):
            raise ServerError(
                f"{self.server}: a completion came without token_ids and their log-probabilities, or with a token "
                f"past the vocabulary: this needs vLLM 0.11 or newer"
            ) from None


def _in_order(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(answer["choices"], key=lambda choice: choice["index"])
