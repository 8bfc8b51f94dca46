"""A fixed text that a server is asked about again and again: what it says of the same tokens must stay the same."""

from collections.abc import Callable, Sequence

from distill.servers.client import Server, ServerError, in_parallel

PROBE = "The capital of France is Paris, and 12 times 12 is 144."
# Mean absolute difference of log-probabilities of the same tokens, in nats, that a precision explains.
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.15, "float16": 0.05}
REPEATED = 8  # rows that are scored twice


class Probe:
    """The log-probabilities of a text's tokens as `server` gave them first."""

    def __init__(
        self, server: Server, token_ids: Sequence[int], score: Callable[[Sequence[int]], list[float]], allowed: float
    ) -> None:
        """Scores some rows twice, the second time in another order; raises `ServerError` where what is said differs.

        `score` gives the log-probability of every token but the first; `allowed` is the mean difference in nats.
        """
        self.server, self._ids, self._score, self._allowed = server, list(token_ids), score, allowed
        rows = [[*token_ids[first:], *token_ids[:first]] for first in range(min(REPEATED, len(token_ids)))]
        found = in_parallel(score, rows), in_parallel(score, rows[::-1])[::-1]
        self.first = found[0][0]
        gap = mean_gap(*([value for row in once for value in row] for once in found))
        if not gap <= self._allowed:
            raise ServerError(
                f"{server}: the same {len(rows)} rows, scored twice in another order, got log-probabilities that "
                f"are {gap:.3g} nats a token apart, where {self._allowed} is allowed: what it says depends on what "
                f"else it is asked. Serve one replica of one model; of vLLM, start it with VLLM_BATCH_INVARIANT=1"
            )

    def check(self) -> None:
        """Raises `ServerError` where the server says something else by now, as one that has another model does."""
        gap = mean_gap(self._score(self._ids), self.first)
        if not gap <= self._allowed:
            raise ServerError(
                f"{self.server}: its log-probabilities of a fixed text are {gap:.3g} nats a token from what they were "
                f"at the start, where {self._allowed} is allowed: it serves another model now. Serve the one that the "
                f"run began with, and give the same command again"
            )


def mean_gap(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two lists of numbers."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
