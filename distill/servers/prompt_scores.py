"""What a server says of a prompt's tokens: their log-probabilities, and a fixed text to ask about as a probe."""

from collections.abc import Sequence

from distill.servers.client import Server, ServerError, UnavailableError, in_parallel

REPEATED = 8  # rows that a check scores twice


class PromptScores:
    """The log-probabilities that a server gives the tokens of a prompt, in whichever way it has of saying them."""

    def __init__(self, server: Server, model: str) -> None:
        self.server, self.model, self._echo = server, model, False

    def settle(self, token_ids: Sequence[int]) -> None:
        """Finds out how this server gives them. Raises `ServerError` where it does not."""
        try:
            self.score(token_ids)
        except UnavailableError:
            raise
        except ServerError as first:
            self._echo = True  # as OpenAI's own API had it, and SGLang's has
            try:
                self.score(token_ids)
            except ServerError:
                raise first from None

    def check_repeats(self, token_ids: Sequence[int]) -> None:
        """Scores some rows twice, the second time in another order; raises `ServerError` where what is said differs."""
        rows = [[*token_ids[first:], *token_ids[:first]] for first in range(min(REPEATED, len(token_ids)))]
        found = in_parallel(self.score, rows), in_parallel(self.score, rows[::-1])[::-1]
        pairs = [pair for both in zip(*found, strict=True) for pair in zip(*both, strict=True)]
        gap, allowed = sum(abs(one - two) for one, two in pairs) / len(pairs), max(TOLERANCE.values())
        if not gap <= allowed:
            raise ServerError(
                f"{self.server}: the same {len(rows)} rows, scored twice in another order, got log-probabilities that "
                f"are {gap:.3g} nats a token apart, where {allowed} is allowed: what it says depends on what else it "
                f"is asked. Serve one replica of one model; of vLLM, start it with VLLM_BATCH_INVARIANT=1"
            )

    def score(self, token_ids: Sequence[int], attempts: bool = True) -> list[float]:
        """Of each token but the first, given those before it, in nats at temperature 1."""
        body = {"model": self.model, "prompt": list(token_ids), "max_tokens": 1, "temperature": 1.0}
        body |= {"echo": True, "logprobs": 1} if self._echo else {"prompt_logprobs": 0}
        answer = (self.server.call if attempts else self.server.request)("/v1/completions", body)
        try:
            choice = answer["choices"][0]
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


# Mean absolute difference of log-probabilities of the same tokens, in nats, that a precision explains.
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.15, "float16": 0.05}
PROBE = "The capital of France is Paris, and 12 times 12 is 144."
