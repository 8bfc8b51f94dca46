"""What a run has come to, as a record: all that its summary and its model card say is made from this."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.config import Config
from distill.training import WARM_START, change_since

NUM_SAMPLES = 6  # held-out completions kept from before and after, for the table and the report


@dataclass(frozen=True)
class Outcome:
    """A run at its end."""

    config: Config
    steps: int
    """Of on-policy distillation."""
    warm_steps: int
    """Of the warm start before it."""
    best_step: int | None
    """That of the best evaluation."""
    metrics: list[dict[str, Any]]
    """The lines of `metrics.jsonl`."""
    evaluations: list[dict[str, Any]]
    """The lines of `evaluations.jsonl`."""
    held_out_prompts: Sequence[str]
    samples: dict[str, list[str]]
    """Completions of the first held-out prompts, `before` and `after`."""
    environment: dict[str, Any]
    rollout_precision: str
    peak_memory_bytes: int
    wall_seconds: float
    cpu_seconds: float

    @property
    def completion_tokens(self) -> int:
        """Tokens of rollouts."""
        return sum(record["completion_tokens"] for record in self.metrics if record.get("phase") != WARM_START)

    @property
    def answer_tokens(self) -> int:
        """Tokens of written answers, in the warm start and after it."""
        warm = sum(record["completion_tokens"] for record in self.metrics if record.get("phase") == WARM_START)
        return warm + sum(record.get("off_policy_tokens", 0) for record in self.metrics)

    @property
    def after_warm_start(self) -> dict[str, Any] | None:
        """The evaluation at the end of the warm start, where there was one."""
        found = (each for each in self.evaluations if 0 < each["step"] == self.warm_steps)
        return next(found, None)

    @property
    def change(self) -> dict[str, float | None]:
        """Of the held-out reverse KL, from the first evaluation to the last: `change_since`'s figures."""
        if not self.evaluations:
            return {"reverse_kl_change": None, "reverse_kl_change_standard_error": None}
        return change_since(self.evaluations[0], self.evaluations[-1])

    @property
    def of_sets(self) -> dict[str, dict[str, float | None]]:
        """By each of the further held-out sets its reverse KL before and after, and what `change` says of it."""
        first, last = (self.evaluations[at].get("sets", {}) if self.evaluations else {} for at in (0, -1))
        return {
            name: {
                "reverse_kl_before": first[name]["reverse_kl"],
                "reverse_kl_after": after["reverse_kl"],
                **change_since(first[name], after),
            }
            for name, after in last.items()
            if name in first
        }

    def shown(self, count: int) -> list[tuple[str, str, str]]:
        """The first held-out prompts with what the student said before and after."""
        completions = self.samples.get("before", []), self.samples.get("after", [])
        return list(zip(self.held_out_prompts[:count], *completions, strict=False))
