"""What is said when a step's numbers are out of order: steps that were skipped, gradients that jump."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

WINDOW = 50  # steps whose gradient norms a new one is compared with
ENOUGH = 10  # steps without which there is no comparison
SPIKE = 10.0  # times their median: noise of single prompts stays below


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


def suspects(prompts: Sequence[str], row_figures: Sequence[float | None] = ()) -> str:
    """The prompts whose rows have a figure that is not finite (or None), or all of them where every row's is."""
    rows = len(row_figures) // len(prompts)
    sound = [figure is not None and math.isfinite(figure) for figure in row_figures]
    bad = [prompt for i, prompt in enumerate(prompts) if not all(sound[i * rows : (i + 1) * rows])]
    return ", ".join(repr(prompt[:80]) for prompt in bad or prompts)
