"""`teacher.server`: a teacher that another process serves and that scores the sampled tokens over HTTP.

It says log q(y) of the tokens y that were sampled, which is enough for `sampled_reverse_kl`, and where it is asked for
them its k likeliest tokens at each place. Its "hidden states" are these numbers; see `loss.HeadPair`.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.loss import ModelParts
from distill.servers import PROBE, PromptScores, Server, in_parallel


class ServedTeacher(ModelParts):
    """A teacher in the loss; `body` is the `PromptScores` of its server."""

    sampled_only = True

    def hidden(self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, lengths: Tensor, index: Tensor):
        """[K, 1 + 2 k] float32 of every token of the rows, which are those of `completion_hidden`: log q(y), and of the
        k likeliest tokens that the server is asked for, k >= 0, their ids and their log-probabilities.
        """
        ask = self.body.top if self.body.top_k else lambda ids: [[value] for value in self.body.score(ids)]
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
        completions = completion_ids.tolist()
        rows = [(prompts[p], completions[r][:n]) for r, (p, n) in enumerate(zip(index, lengths.tolist(), strict=True))]

        def score(row: tuple[list[int], list[int]]) -> list[list[float]]:
            prompt, completion = row
            # A slice from -0 would be the whole prompt.
            return ask(prompt + completion)[len(prompt) - 1 :] if completion else []

        found = [said for of_row in in_parallel(score, rows) for said in of_row]
        return torch.tensor(found, device=completion_ids.device).view(-1, self.width)

    @property
    def width(self) -> int:
        return 1 + 2 * self.body.top_k

    def named(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Ids and log-probabilities of the likeliest tokens in what `hidden` gave, if the server is asked for them."""
        ids, logprob = hidden[:, 1:].chunk(2, 1)
        return (ids.long(), logprob) if self.body.top_k else None  # in float32 every id below 2^24 is exact


def connect(
    server: Server, reference: str, tokenizer: PreTrainedTokenizerBase, top_k: int = 0
) -> tuple[ServedTeacher, int | None]:
    """The teacher on a server, checked as far as it can be, and the tokens that it can take.

    Raises `ServerError` for one that scores no prompts, that says something else when it is asked again, or that has
    another vocabulary than `tokenizer`.
    """
    about = server.model(reference)
    scores = PromptScores(server, about["id"], top_k)
    token_ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    server.check_tokenizer(scores.model, PROBE, token_ids)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    # With the last token of the vocabulary, which a smaller one does not have.
    scores.settle([*token_ids, vocab_size - 1])
    scores.check_repeats(token_ids)
    return ServedTeacher(scores, None, torch.float32), about.get("max_model_len")
