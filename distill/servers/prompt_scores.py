"""What a server says of a prompt's tokens: their log-probabilities."""

from collections.abc import Sequence
from typing import Any

from distill.servers.client import Server, ServerError, UnavailableError, about_prompt


class PromptScores:
    """The log-probabilities that a server gives the tokens of a prompt, in whichever way it has of saying them."""

    def __init__(self, server: Server, model: str, top_k: int = 0) -> None:
        """With `top_k`, of so many likeliest tokens at each place, too."""
        self.server, self.model, self.top_k, self._echo = server, model, top_k, False

    def settle(self, token_ids: Sequence[int]) -> None:
        """Finds out how this server gives them. Raises `ServerError` where it does not."""
        try:
            self.top(token_ids) if self.top_k else self.score(token_ids)
        except UnavailableError:
            raise
        except ServerError as first:
            if self.top_k:
                raise ServerError(
                    f"{first}. Of the {self.top_k} likeliest tokens' log-probabilities (teacher.server_top_k) a vLLM "
                    f"server gives at most what it is started with, --max-logprobs, 20 by default; others give none: "
                    f"raise that, lower teacher.server_top_k, or set loss.objective to sampled_reverse_kl"
                ) from None
            self._echo = True  # as OpenAI's own API had it, and SGLang's has
            try:
                self.score(token_ids)
            except ServerError:
                raise first from None

    def score(self, token_ids: Sequence[int], attempts: bool = True) -> list[float]:
        """Of each token but the first, given those before it, in nats at temperature 1."""
        how = {"echo": True, "logprobs": 1} if self._echo else {"prompt_logprobs": 0}
        choice = self._asked(token_ids, how, attempts)
        try:
            if self._echo:
                found = choice["logprobs"]["token_logprobs"][1 : len(token_ids)]
            else:
                said = choice["prompt_logprobs"][1:]
                found = [at[str(token)]["logprob"] for at, token in zip(said, token_ids[1:], strict=True)]
            if len(found) != len(token_ids) - 1:
                raise ValueError
            return [float(value) for value in found]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerError(
                f"{self.server}: returns no log-probabilities of the prompt's tokens, which scoring needs: "
                f"/v1/completions must understand prompt_logprobs (vLLM), or echo with logprobs (SGLang)"
            ) from None

    def top(self, token_ids: Sequence[int]) -> list[list[float]]:
        """As `score`, each followed by the ids of the `top_k` likeliest tokens there and by their log-probabilities,
        the likeliest first."""
        choice, k = self._asked(token_ids, {"prompt_logprobs": self.top_k}, True), self.top_k
        try:
            found = []
            for at, token in zip(choice["prompt_logprobs"][1:], token_ids[1:], strict=True):
                said = sorted(((float(one["logprob"]), int(name)) for name, one in at.items()), reverse=True)[:k]
                if len(said) < k:
                    raise ValueError
                found.append([float(at[str(token)]["logprob"]), *(i for _, i in said), *(p for p, _ in said)])
            return found
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise ServerError(
                f"{self.server}: returns no {k} likeliest tokens at each place of a prompt: /v1/completions must "
                f"understand prompt_logprobs (vLLM)"
            ) from None

    def _asked(self, token_ids: Sequence[int], how: dict[str, Any], attempts: bool) -> Any:
        ask = self.server.call if attempts else self.server.request
        answer = ask("/v1/completions", about_prompt(self.model, token_ids) | how)
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            return None
