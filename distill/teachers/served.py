"""`teacher.server`: a teacher that another process serves and that scores the sampled tokens over HTTP.

It knows log q(y) of the tokens y that were sampled and nothing of the rest of the vocabulary, which is enough for
`sampled_reverse_kl`. Its "hidden states" are those log-probabilities, one number a token; see `loss.HeadPair`.
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
        """[k, 1] float32: log q(y) of every token of the rows, which are those of `completion_hidden`."""
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
        completions = completion_ids.tolist()
        rows = [(prompts[p], completions[r][:n]) for r, (p, n) in enumerate(zip(index, lengths.tolist(), strict=True))]

        def score(row: tuple[list[int], list[int]]) -> list[float]:
            prompt, completion = row
            # A slice from -0 would be the whole prompt.
            return self.body.score(prompt + completion)[len(prompt) - 1 :] if completion else []

        found = [logprob for of_row in in_parallel(score, rows) for logprob in of_row]
        return torch.tensor(found, device=completion_ids.device)[:, None]


def connect(server: Server, reference: str, tokenizer: PreTrainedTokenizerBase) -> tuple[ServedTeacher, int | None]:
    """The teacher on a server, checked as far as it can be, and the tokens that it can take.

    Raises `ServerError` for one that scores no prompts, that says something else when it is asked again, or that has
    another vocabulary than `tokenizer`.
    """
    about = server.model(reference)
    scores = PromptScores(server, about["id"])
    token_ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    server.check_tokenizer(scores.model, PROBE, token_ids)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    # With the last token of the vocabulary, which a smaller one does not have.
    scores.settle([*token_ids, vocab_size - 1])
    scores.check_repeats(token_ids)
    return ServedTeacher(scores, None, torch.float32), about.get("max_model_len")
