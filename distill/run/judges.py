"""The metrics of a run's held-out sets: each function is started once, before anything is loaded, and ended at the end.

Over ranks the first alone has processes for them; the others wait for what it found.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from distill.config import Config, ConfigError
from distill.grading import Grade, Grader, GradingFunction, names, resolve
from distill.loss import Rollouts
from distill.report import MAIN_SET
from distill.training import Judged, Ranks, calls_of, running


class Judges:
    """The metrics by set and name, from entering this context to leaving it."""

    def __init__(
        self,
        asked: Mapping[str, tuple[str, Sequence[str]]],
        *,
        timeout_seconds: float = 10,
        ranks: Ranks | None = None,
    ) -> None:
        """`asked` holds by set the key that names its metrics, and what it names. Raises `FunctionError` for a metric
        that there is not."""
        self._ranks, self._open = ranks or Ranks(), contextlib.ExitStack()
        self._functions: dict[str, dict[str, GradingFunction]] = {}
        self._graders: dict[str, Grader] = {}
        for name, (key, references) in asked.items():
            functions = [resolve(reference, key) for reference in dict.fromkeys(references)]
            self._functions[name] = dict(zip(names(functions), functions, strict=True))
            for function in functions:
                grader = Grader(function, timeout_seconds=timeout_seconds)
                self._graders.setdefault(function.reference, grader)

    @classmethod
    def of_run(cls, config: Config, ranks: Ranks) -> Self:
        """Those of a run's evaluations. Raises `FunctionError` and `ConfigError`."""
        settings = config.evaluation
        asked = {MAIN_SET: ("evaluation.metrics", settings.metrics)}
        for name, own in settings.sets.items():
            if name == MAIN_SET:
                raise ConfigError(f"evaluation.sets.{name}: that is what prompts.eval is called: give it another name")
            given = own.metrics is not None
            asked[name] = (f"evaluation.sets.{name}.metrics", own.metrics) if given else asked[MAIN_SET]
        return cls(asked, timeout_seconds=settings.timeout_seconds, ranks=ranks)

    def of_set(self, name: str) -> list[str]:
        """The names of a set's metrics."""
        return list(self._functions[name])

    def __enter__(self) -> Self:
        """Starts them; raises `FunctionError` on every rank where one cannot be loaded."""
        self._open.enter_context(running(self._graders.values(), self._ranks))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(
        self, name: str, tokenizer: Any, records: Sequence[Mapping[str, Any]], rollouts: Rollouts
    ) -> dict[str, Judged]:
        """What each of a set's metrics says of the rollouts of prompts with these records; on every rank."""
        if not self._functions[name]:
            return {}
        found = self._ranks.by_first(lambda: self._judge(name, calls_of(tokenizer, records, rollouts)))
        return {metric: Judged(*each) for metric, each in found.items()}

    def _judge(self, name: str, calls: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, Judged]:
        found = {}
        for metric, function in self._functions[name].items():
            grades: list[Grade] = self._graders[function.reference].grades(calls)
            errors = [grade.error for grade in grades if grade.error is not None]
            values = [0.0 if grade.error is not None else grade.value for grade in grades]
            found[metric] = Judged(values, len(errors), errors[0] if errors else None)
        return found


def failures(judged: Mapping[str, Judged]) -> list[str]:
    """Of each metric that failed on some completions: on how many, and why on the first."""
    return [
        f"{metric} failed on {found.failed} of {len(found.values)} completions, which count as 0: {found.reason}"
        for metric, found in judged.items()
        if found.failed
    ]
