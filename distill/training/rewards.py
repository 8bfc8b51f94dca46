"""Rewards of tasks beside the teacher: rollouts are judged once a batch, before the first step that learns from them.

With x_rf the reward of rollout r by function f, and w_f its weight, the advantage of r over the other rollouts of its
prompt is

    A_r = Σ_f w_f (x_rf − mean of x_sf over the prompt's other rollouts s that have one)

so that the loss −A_r log p(y), with A constant, has the gradient of −Σ_f w_f E[x_f], without bias: what is subtracted
does not depend on r (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"). A reward that is missing
moves nothing. Divided by the spread of the prompt's rewards (GRPO, Shao et al. 2024) that gradient is another one.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.config import RewardConfig
from distill.grading import Grade, Grader, names, resolve
from distill.loss import Rollouts
from distill.training.judging import calls_of, running
from distill.training.ranks import Ranks

SHOWN = 3  # reasons of a batch's failures


class Task(NamedTuple):
    """One reward function."""

    name: str
    """What figures and events call it."""
    weight: float
    grader: Grader


@contextlib.contextmanager
def started_tasks(rewards: Sequence[RewardConfig], ranks: Ranks) -> Iterator[list[Task]]:
    """The tasks of the configuration, within this context; on rank 0, which judges for all, each in a process.

    Raises `FunctionError`, on every rank.
    """
    functions = [resolve(reward.function, "rewards") for reward in rewards]
    limits = [{"timeout_seconds": reward.timeout_seconds, "memory_gib": reward.memory_gib} for reward in rewards]
    tasks = [
        Task(name, reward.weight, Grader(function, **limit))
        for name, reward, function, limit in zip(names(functions), rewards, functions, limits, strict=True)
    ]
    with running([task.grader for task in tasks], ranks):
        yield tasks


class TaskRewards:
    """What the trainer has judge its rollouts; `report` hears of rewards that could not be had."""

    def __init__(
        self,
        tasks: Sequence[Task],
        records: Sequence[dict[str, Any]],
        tokenizer: Any,
        *,
        scale: bool,
        ranks: Ranks,
    ) -> None:
        """`records` are the prompts' by their index."""
        self.tasks, self._records, self._tokenizer = tasks, records, tokenizer
        self._scale, self._ranks = scale, ranks
        self._weights = torch.tensor([task.weight for task in tasks], dtype=torch.float64)
        self.report: Callable[[str], None] = lambda message: None

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each function's file, by its reference."""
        functions = [task.grader.function for task in self.tasks]
        return {each.reference: each.sha256 for each in functions if each.sha256 is not None}

    def __call__(self, rollouts: Rollouts, prompts: Sequence[int]) -> Rollouts:
        """The rollouts of these prompts with their rewards and, where one is trained on, what that is worth."""
        judged = self._ranks.by_first(lambda: self._judge(rollouts, prompts))
        rewards = torch.tensor(judged, dtype=torch.float64).T
        if not self._weights.any():
            return replace(rollouts, rewards=rewards)
        index = torch.arange(len(rewards)) // rollouts.num_rollouts
        advantage = task_advantages(rewards, self._weights, index, scale=self._scale)
        return replace(rollouts, rewards=rewards, task_advantage=advantage)

    def figures(self, rollouts: Rollouts) -> dict[str, float]:
        """Of a step's rollouts, for its line of metrics; NaN where there is no reward at all."""
        rewards = rollouts.rewards
        of_each = {
            f"reward/{task.name}": mean for task, mean in zip(self.tasks, rewards.nanmean(0).tolist(), strict=True)
        }
        total = (rewards * self._weights).nansum(1)
        of_prompts = [of for of in total.split(rollouts.prompt_index.bincount().tolist()) if len(of)]
        spreads = [of.std() for of in of_prompts if len(of) > 1]
        return {
            "reward": total.mean().item(),
            "reward_spread": torch.stack(spreads).mean().item() if spreads else math.nan,
            "reward_contrast": sum((of.max() > of.min()).item() for of in of_prompts) / len(of_prompts),
            "reward_missing": int(rewards.isnan().sum()),
            **of_each,
        }

    def of_rows(self, rollouts: Rollouts) -> list[dict[str, float | None]]:
        """Each rollout's rewards by their names."""
        known = [[None if math.isnan(x) else x for x in row] for row in rollouts.rewards.tolist()]
        return [dict(zip((task.name for task in self.tasks), row, strict=True)) for row in known]

    def _judge(self, rollouts: Rollouts, prompts: Sequence[int]) -> list[list[float]]:
        """[F][R]."""
        calls = calls_of(self._tokenizer, [self._records[prompt] for prompt in prompts], rollouts)
        found = []
        for task in self.tasks:
            grades = task.grader.grades(calls)
            if complaint := complaint_of(task.name, grades):
                self.report(complaint)
            found.append([math.nan if grade.value is None else grade.value for grade in grades])
        return found


def complaint_of(name: str, grades: Sequence[Grade]) -> str:
    """What a function failed at, in a line, the commonest reasons first; empty where it did not."""
    errors = Counter(grade.error for grade in grades if grade.error is not None)
    if not errors:
        return ""
    reasons = "; ".join(f"{reason} ({count} times)" for reason, count in errors.most_common(SHOWN))
    return f"{name}: no value for {errors.total()} of {len(grades)} completions: {reasons}"


def task_advantages(rewards: Tensor, weights: Tensor, prompt_index: Tensor, *, scale: bool = False) -> Tensor:
    """A [R] float32 of rewards [R, F] float64, NaN where there is none, weights [F] float64, index [R]; on the host.

    `scale` divides by the standard deviation of the prompt's weighted rewards, where it is above 0.
    """
    x, known = rewards.nan_to_num(0), ~rewards.isnan()
    same = (prompt_index[:, None] == prompt_index).double()  # [R, R]
    others = same - torch.eye(len(x), dtype=torch.float64)
    count = others @ known.double()
    above = torch.where(known & (count > 0), x - others @ x / count.clamp(min=1), 0)  # [R, F]
    advantage = above @ weights
    if scale:
        rollouts = same.sum(1)
        mean = (same @ x) / (same @ known.double()).clamp(min=1)
        total = torch.where(known, x - mean, 0) @ weights
        spread = ((same @ total.square()) / (rollouts - 1).clamp(min=1)).sqrt()
        advantage = torch.where(spread > 1e-12, advantage / spread.clamp(min=1e-12), 0)
    return advantage.float()
