"""`training.early_stopping`: whether a run has had enough, and which of its evaluations is the best.

Both are functions of the evaluations so far alone, so that a run that was killed and continued decides alike.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distill.config import Config, ConfigError
from distill.report import MAIN_SET
from distill.run.judges import Judges
from distill.training import pass_figures

KEY = "training.early_stopping"
Evaluations = Sequence[Mapping[str, Any]]
ROUNDING = 1e-9  # of means of the same numbers in another order


class Target(NamedTuple):
    """A figure of an evaluation that is to get better."""

    name: str
    set: str
    metric: str | None
    """None: the reverse KL, which is to fall."""
    figure: str | None

    def value(self, evaluation: Mapping[str, Any]) -> float:
        """In an evaluation's record, the higher the better; NaN where it is unknown."""
        of_set = evaluation if self.set == MAIN_SET else evaluation.get("sets", {}).get(self.set, {})
        if self.metric is None:
            found = of_set.get("reverse_kl")
            return math.nan if found is None else -found
        found = of_set.get("metrics", {}).get(self.metric, {}).get(self.figure, {}).get("mean")
        return math.nan if found is None else found


REVERSE_KL = Target("reverse_kl", MAIN_SET, None, None)


def target_of(config: Config, judges: Judges) -> Target:
    """What `training.early_stopping.metric` names; without early stopping the reverse KL. Raises `ConfigError`."""
    settings = config.training.early_stopping
    if settings is None:
        return REVERSE_KL
    if config.training.eval_every is None:
        raise ConfigError(f"{KEY} looks at evaluations between steps: set training.eval_every")
    known: dict[str, Target] = {}
    for name in (MAIN_SET, *config.evaluation.sets):
        own = config.evaluation.sets.get(name)
        count = (own and own.num_rollouts_per_prompt) or config.evaluation.num_rollouts_per_prompt
        before = "" if name == MAIN_SET else f"{name}/"
        known[f"{before}reverse_kl"] = Target(f"{before}reverse_kl", name, None, None)
        for metric in judges.of_set(name):
            mean, *passes = pass_figures(count)
            written = {f"{before}{metric}": mean} | {f"{before}{metric}/{figure}": figure for figure in passes}
            # What stands first is meant where a set has the name of a metric.
            for key, figure in written.items():
                known.setdefault(key, Target(key, name, metric, figure))
    if settings.metric in known:
        return known[settings.metric]
    near = difflib.get_close_matches(settings.metric, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{KEY}.metric: found {settings.metric!r}{meant} There are {', '.join(known)}")


def best_step(evaluations: Evaluations, target: Target, *, since: int = 0) -> int | None:
    """The step of the first of the best evaluations after step `since`; the student as it was then does not count."""
    best, at = -math.inf, None
    for evaluation in evaluations:
        value = target.value(evaluation)
        if evaluation["step"] > since and math.isfinite(value) and value > best + ROUNDING:
            best, at = value, evaluation["step"]
    return at


def had_enough(evaluations: Evaluations, target: Target, *, patience: int, min_delta: float) -> str | None:
    """Why a run ends after the last of these evaluations, in words; None where it goes on.

    It ends after `patience` evaluations in a row none of which is more than `min_delta` better than the best before
    them, the untrained student's included. What is not known is no better.
    """
    best, best_step, waited = -math.inf, None, 0
    for evaluation in evaluations:
        value = target.value(evaluation)
        if value > best + max(min_delta, ROUNDING):
            best, best_step, waited = value, evaluation["step"], 0
        else:
            waited += 1
    if waited < patience:
        return None
    since = "never known" if best_step is None else f"best after step {best_step} ({abs(best):.4g})"
    return f"{target.name} has not got better in {waited} evaluations: {since}"
