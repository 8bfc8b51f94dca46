"""How a group becomes one number: the `loss` section of the configuration, as the loss reads it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill.loss.group import Group


@dataclass(frozen=True)
class LossOptions:
    """How a group becomes one number; see the `loss` section of the configuration."""

    objective: str = "sampled_reverse_kl"
    reduction: str = "sequence"
    temperature: float = 1.0
    importance_sampling: str = "stale"
    importance_clip: float | None = None
    baseline: str = "none"
    discount: float = 0.0
    reward_clip: float | None = None
    beta: float = 0.5
    mask_truncated: bool = False
    of_written: str | None = None
    """The objective of written answers; None: `objective`, or what it is in the mean at each position."""

    def ratio_to(self, group: Group) -> Tensor | None:
        """[R, T] log-probabilities below the importance ratio, None where there is no ratio."""
        of_sampled = self.objective == "sampled_reverse_kl" or group.task_advantage is not None
        if not of_sampled or self.importance_clip is None:
            return None
        return {"none": None, "stale": group.logprob, "sampler": group.sampling_logprob}[self.importance_sampling]

    def objectives(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a fused loss is told of the objective: of rollouts, and of written answers."""
        own = "sampled_reverse_kl" if self.objective == "rewards" else self.objective
        written = self.of_written or ("reverse_kl" if own == "sampled_reverse_kl" else own)
        return {"objective": own, "beta": self.beta}, {"objective": written, "beta": self.beta}
