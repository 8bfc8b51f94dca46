"""What rewards and metrics have in common: functions that run on rank 0 alone, and what they are called with."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from distill.grading import FunctionError, Grader
from distill.loss import Rollouts
from distill.training.evaluation import decode_samples
from distill.training.ranks import Ranks


@contextlib.contextmanager
def running(graders: Iterable[Grader], ranks: Ranks) -> Iterator[None]:
    """Within this context rank 0, which judges for all, has a process for each.

    Raises `FunctionError`, on every rank.
    """
    with contextlib.ExitStack() as started:

        def start() -> None:
            for grader in graders if ranks.rank == 0 else ():
                started.callback(grader.close)
                grader.start()

        ranks.together(start, (FunctionError,))
        yield


def calls_of(
    tokenizer: Any, records: Sequence[Mapping[str, Any]], rollouts: Rollouts
) -> list[tuple[Mapping[str, Any], str]]:
    """Each rollout's record and text; `records` are those of its prompts."""
    texts = decode_samples(tokenizer, rollouts, range(len(rollouts.finished)))
    return [(records[row // rollouts.num_rollouts], text) for row, text in enumerate(texts)]
