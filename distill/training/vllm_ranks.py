"""`rollout.engine: vllm` over ranks: rank 0 asks the server for all prompts, and every rank gets every rollout.

Weights that are shared out are gathered for it on a CPU, once a batch. While the server works the others wait with rank
0, however long that takes, and what goes wrong there is raised on all of them.
"""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from distill.loss import Rollouts
from distill.rollout import VllmEngine
from distill.servers import Server, ServerError
from distill.training.ranks import Ranks

T = TypeVar("T")

# What the server gives of rollouts; the rest is what it was asked for.
ANSWER = ("completion_ids", "completion_lengths", "logprob", "sampling_logprob", "finished")


class RankedVllmEngine:
    """Like `VllmEngine`, on every rank; all have to ask it for the same, in the same order."""

    engine = "vllm"

    def __init__(self, ranks: Ranks, model: PreTrainedModel, make: Callable[[PreTrainedModel], VllmEngine]) -> None:
        """`make` gives rank 0's engine, from a model in one piece. Raises `ServerError` on all ranks."""
        self.ranks, self.model, self._background = ranks, model, ThreadPoolExecutor(1)
        whole = self._whole()
        self._own: VllmEngine | None = self._first_does(lambda: make(whole))
        own = self._own
        self.precision, self.pad_token_id = ranks.of_first(own and [own.precision, own.pad_token_id])

    @property
    def server(self) -> Server | None:
        """The client of the server, which rank 0 has."""
        return self._own and self._own.server

    def refresh(self) -> None:
        """Says that the student's weights have changed."""
        if self._own:
            self._own.refresh()

    def variant(self, *, seed: int, **sampling: float) -> "RankedVllmEngine":
        """The same engine with another seed and these `SamplingOptions`."""
        other = copy.copy(self)
        other._own = self._own and self._own.variant(seed=seed, **sampling)
        return other

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, num_rollouts: int, prompt_keys: Tensor) -> Rollouts:
        """See `VllmEngine.generate`; the prompts are those of all ranks."""
        return self.begin(prompt_ids, prompt_mask, num_rollouts=num_rollouts, prompt_keys=prompt_keys).result()

    def begin(
        self, prompt_ids: Tensor, prompt_mask: Tensor, *, num_rollouts: int, prompt_keys: Tensor
    ) -> "RolloutsOfFirst":
        """`generate` in the background, from the weights of now whatever becomes of them."""
        own = self._own
        self._first_does(lambda: own.settle())
        if self.ranks.of_first(own and own.weights.stale):
            whole = self._whole()
            self._first_does(lambda: own.weights.snapshot(whole))
        asked = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "num_rollouts": num_rollouts}
        return RolloutsOfFirst(self.ranks, own and own.begin(**asked, prompt_keys=prompt_keys), asked)

    def _whole(self) -> PreTrainedModel:
        """The student in one piece, on rank 0."""
        whole = self.ranks.gathered_model(self.model)
        if self.ranks.sharded and not self.ranks.rank:
            whole.cpu().set_attn_implementation("sdpa")
        return whole

    def _first_does(self, work: Callable[[], T]) -> T | None:
        """Rank 0's `work()`, there; raises its `ServerError` on all ranks."""
        return result_of_first(self.ranks, None if self.ranks.rank else self._background.submit(work))


class RolloutsOfFirst:
    """Rollouts under way on rank 0, for every rank; all have to ask for the `result`."""

    def __init__(self, ranks: Ranks, future: "Future[Rollouts] | None", asked: dict[str, Any]) -> None:
        self._ranks, self._future, self._asked = ranks, future, asked
        self._found: Rollouts | None = None

    def result(self) -> Rollouts:
        """Waits for them. Raises `ServerError` on all ranks."""
        if self._found is None:
            own = result_of_first(self._ranks, self._future)
            answer = self._ranks.tensors_of_first(
                {name: getattr(own, name) for name in ANSWER} if own else {}, self._asked["prompt_ids"].device
            )
            self._found = Rollouts(**self._asked, **answer)
        return self._found


def result_of_first(ranks: Ranks, future: "Future[T] | None") -> T | None:
    """What rank 0's `future` gives, there; raises its `ServerError` on all ranks."""
    ranks.wait_for_first(future)
    return ranks.together(lambda: future and future.result(), (ServerError,))
