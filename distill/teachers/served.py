"""`teacher.server`: a teacher that another process serves, asked over HTTP about the tokens that were sampled.

It is asked for one of two things. For log q(y) of these tokens y, which is enough for `sampled_reverse_kl`, and that of
its k likeliest tokens at each place: its "hidden states" are these numbers then, see `loss.HeadPair`. Or for its hidden
states, which with its norm and its head, loaded here, are all that any objective needs.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distill.loss import ModelParts
from distill.models import ModelEnd, ModelError
from distill.servers import (
    PLUGIN,
    PROBE,
    TOLERANCE,
    Probe,
    PromptScores,
    PromptStates,
    Server,
    ServerError,
    in_parallel,
    mean_gap,
)

Row = tuple[list[int], list[int]]  # a prompt's token ids, and those of a completion


class Served(NamedTuple):
    """The body of a teacher on a server: what asks it, and what finds out whether it still says the same."""

    asked: PromptScores | PromptStates
    probe: Probe
    norm: nn.Module | None = None  # of hidden states

    @property
    def server(self) -> Server:
        return self.asked.server


class ServedScores(ModelParts):
    """A teacher in the loss that says log-probabilities; `body` is a `Served`."""

    elsewhere = True

    def hidden(self, *rollouts: Tensor) -> Tensor:
        """[K, 1 + 2 k] float32 of every token of the rows, which are those of `completion_hidden`: log q(y), and of the
        k likeliest tokens that the server is asked for, k >= 0, their ids and their log-probabilities.
        """
        scores = self.body.asked
        ask = scores.top if scores.top_k else lambda ids: [[value] for value in scores.score(ids)]

        def score(row: Row) -> list[list[float]]:
            prompt, completion = row
            # A slice from -0 would be the whole prompt.
            return ask(prompt + completion)[len(prompt) - 1 :] if completion else []

        found = [said for of_row in in_parallel(score, _rows(*rollouts)) for said in of_row]
        self.body.probe.check()
        return torch.tensor(found, device=rollouts[0].device).view(-1, self.width)

    @property
    def width(self) -> int:
        return 1 + 2 * self.body.asked.top_k

    def named(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Ids and log-probabilities of the likeliest tokens in what `hidden` gave, if the server is asked for them."""
        ids, logprob = hidden[:, 1:].chunk(2, 1)
        return (ids.long(), logprob) if self.body.asked.top_k else None  # in float32 every id below 2^24 is exact


class ServedStates(ModelParts):
    """A teacher in the loss whose layers a server computes; `body` is a `Served`."""

    elsewhere = True

    def hidden(self, *rollouts: Tensor) -> Tensor:
        """[K, H] as `completion_hidden` gives them."""

        def states(row: Row) -> Tensor:
            prompt, completion = row
            return self.body.asked.of(prompt + completion, len(prompt) - 1)[:-1]

        found = torch.cat(in_parallel(states, _rows(*rollouts)))
        self.body.probe.check()
        return self.normed(found)

    def normed(self, states: Tensor) -> Tensor:
        """[.., H] as the server gives them to what the head takes."""
        if not states.isfinite().all():
            raise ServerError(f"{self.body.server}: gives hidden states that are not finite")
        try:
            with torch.no_grad():
                return self.body.norm(states.to(self.head.weight.device).float()).to(self.dtype)
        except RuntimeError as error:
            raise ServerError(
                f"{self.body.server}: its hidden states do not fit teacher.model's norm: {error}"
            ) from None


def _rows(prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, lengths: Tensor, index: Tensor) -> list[Row]:
    """The rows of `completion_hidden` as lists."""
    prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
    completions = completion_ids.tolist()
    return [(prompts[p], completions[r][:n]) for r, (p, n) in enumerate(zip(index, lengths.tolist(), strict=True))]


def connect(
    server: Server,
    reference: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    gives: str = "sampled",
    top_k: int = 0,
    load: Callable[[], ModelEnd] | None = None,
) -> tuple[ServedScores | ServedStates, int | None]:
    """The teacher on a server, checked as far as it can be, and the tokens that it can take.

    `gives` is what it is asked for, as in `teacher.server_gives`, `top_k` how many likeliest tokens, and `load` reads
    the model's end, which hidden states need here. Raises `ServerError` for a server that does not give it, that says
    something else when it is asked again, or that has another vocabulary than `tokenizer`, and `ModelError`.
    """
    about = server.model(reference)
    token_ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    server.check_tokenizer(about["id"], PROBE, token_ids)
    context, last = about.get("max_model_len"), max(tokenizer.get_vocab().values())
    states = PromptStates(server, about["id"])
    if gives == "hidden" or (gives == "auto" and states.gives(token_ids)):
        try:
            end = load()
        except ModelError as error:
            raise ModelError(
                f"{error}; its hidden states are of no use then: set teacher.server_gives to top_k"
            ) from None
        return _states(states, end, reference, token_ids, last), context
    scores = PromptScores(server, about["id"], 0 if gives == "sampled" else top_k)
    scores.settle([*token_ids, last])  # which a smaller vocabulary does not have
    probe = Probe(server, token_ids, scores.score, max(TOLERANCE.values()))  # it does not say its precision
    return ServedScores(Served(scores, probe), None, torch.float32), context


def _states(states: PromptStates, end: ModelEnd, reference: str, token_ids: Sequence[int], last: int) -> ServedStates:
    """The teacher whose hidden states a server gives; they are found to lead to the server's own log-probabilities."""
    server = states.server
    states.remedy = f"start it with {command(reference, end.num_layers)}"
    found = states.of(token_ids)
    V, width = end.head.weight.shape
    if found.shape[1] != width or last >= V:
        raise ServerError(
            f"{server}: its hidden states have {found.shape[1]} numbers and the tokenizer {last + 1} tokens, where the "
            f"head of {reference} takes {width} and has {V}: it serves another model than teacher.model names"
        )
    parts = ServedStates(Served(states, None, end.norm), end.head, end.head.weight.dtype)

    def score(ids: Sequence[int]) -> list[float]:
        logprobs = end.head.logits(parts.normed(states.of(ids)[:-1])).log_softmax(-1)
        return logprobs.gather(1, torch.tensor(ids[1:], device=logprobs.device)[:, None])[:, 0].tolist()

    # Rounded are its states there, and its logits here.
    allowed = max(TOLERANCE.get(str(dtype).removeprefix("torch."), 0.0) for dtype in (found.dtype, parts.dtype))
    probe = Probe(server, token_ids, score, allowed)
    scores = PromptScores(server, states.model)
    scores.settle([*token_ids, last])
    gap = mean_gap(scores.score(token_ids), probe.first)
    if not gap <= allowed:
        raise ServerError(
            f"{server}: its hidden states, through the last norm and the head of {reference}, give log-probabilities "
            f"that are {gap:.3g} nats a token off its own, where {allowed} is allowed: they are not those "
            f"after the last layer, it serves another model, or that model has more than a norm there (then set "
            f"teacher.server_gives to top_k); {states.remedy}"
        )
    return parts._replace(body=parts.body._replace(probe=probe))


def server_options(num_layers: int, folder: str = "/dev/shm/hidden-states") -> list[str]:
    """Of a vLLM server that writes the hidden states after the last of `num_layers` layers to `folder`."""
    extract = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [num_layers]}},
    }
    transfer = {
        "kv_connector": "HiddenStatesConnector",
        "kv_connector_module_path": "hidden_states_connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }
    return ["--speculative-config", json.dumps(extract), "--kv-transfer-config", json.dumps(transfer)]


def command(reference: str, num_layers: int) -> str:
    """How such a server is started."""
    return f"PYTHONPATH={PLUGIN} {shlex.join(['vllm', 'serve', reference, *server_options(num_layers)])}"
