"""What is said when a run's numbers are out of order: skipped steps, gradients that jump, completions cut by length."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import RolloutConfig

WINDOW = 50  # steps whose gradient norms a new one is compared with
ENOUGH = 10  # steps without which there is no comparison
SPIKE = 10.0  # times their median: noise of single prompts stays below
CUT_WINDOW = 10  # steps whose completions are counted together
CUT = 0.5  # part of them that may be cut by length


class StoppedError(RuntimeError):
    """A run that cannot go on by itself, with a checkpoint saved."""

    @classmethod
    def after(cls, in_row: int, allowed: int, good_step: int, checkpoints: Path, last: str) -> "StoppedError":
        """More bad steps in a row than allowed; `last` describes the last of them, `good_step` came before them."""
        return cls(
            f"{in_row} steps in a row had no finite loss and gradient (training.max_bad_steps: {allowed}), the last "
            f"with {last}. The weights of step {good_step}, the last good one, are saved in {checkpoints}. Look at "
            f"these prompts and at the teacher, or set a lower training.learning_rate or training.precision: float32 "
            f"in a new training.output_dir"
        )


class GradientWatch:
    """Compares each gradient norm with the median of the last ones, which no single one can move far."""

    def __init__(self, norms: Iterable[float | None] = ()) -> None:
        self._norms: deque[float] = deque((n for n in norms if n is not None and math.isfinite(n)), maxlen=WINDOW)

    def spike(self, norm: float) -> float | None:
        """The median that `norm` exceeds by far, or None; `norm` then counts among the last ones."""
        median = statistics.median(self._norms) if len(self._norms) >= ENOUGH else math.inf
        if math.isfinite(norm):
            self._norms.append(norm)
        return median if SPIKE * median < norm < math.inf else None


class LengthWatch:
    """Says once in a run that most completions are cut by length, and so teach no end."""

    def __init__(self, rollout: RolloutConfig, steps: Iterable[Mapping[str, Any]] = (), *, said: bool = False) -> None:
        """`steps` are the metrics of those that are done; `said` is whether it was said then."""
        self._rollout, self._said = rollout, said
        self._steps = deque(map(_cut_and_all, steps), maxlen=CUT_WINDOW)

    def complaint(self, metrics: Mapping[str, Any], *, last: bool) -> str | None:
        """What there is to say after a step, `last` that of the run, over as many as there are if those are few."""
        self._steps.append(_cut_and_all(metrics))
        steps, (cut, rollouts) = len(self._steps), map(sum, zip(*self._steps, strict=True))
        if self._said or cut <= CUT * rollouts or (steps < CUT_WINDOW and not last):
            return None
        self._said = True
        over = f"the last {steps} steps" if steps == CUT_WINDOW else "all steps"
        effect = "the student is seldom taught to end. Raise it"
        if self._rollout.mask_truncated:
            effect = "rollout.mask_truncated leaves them out of the loss, so most are sampled in vain. Raise the limit"
        return (
            f"{cut / rollouts:.0%} of the completions of {over} were cut at rollout.max_new_tokens "
            f"({self._rollout.max_new_tokens}): {effect}, or choose prompts with shorter answers"
        )


def _cut_and_all(metrics: Mapping[str, Any]) -> tuple[float, float]:
    """A step's completions that were cut, and all of them."""
    rollouts = metrics["completion_tokens"] / metrics["completion_length"]
    return metrics["truncated_fraction"] * rollouts, rollouts


def suspects(prompts: Sequence[str], rows: Iterable[tuple[int, float | None]] = ()) -> str:
    """The prompts one of whose rows, each its prompt's index and a figure, has one that is not finite (or None); all
    where that is every prompt, or none."""
    wrong = {index for index, figure in rows if figure is None or not math.isfinite(figure)}
    bad = [prompt for index, prompt in enumerate(prompts) if index in wrong]
    return ", ".join(repr(prompt[:80]) for prompt in bad or prompts)
