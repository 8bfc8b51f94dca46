"""Held-out evaluation: the exact reverse KL on the student's own completions of prompts it never trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.loss import Group, ModelParts, Rollouts, TeacherView, statistics
from distill.models import ModelError
from distill.rollout import RolloutEngine
from distill.runtime import MemoryLimits
from distill.training.clusters import ClusterSums
from distill.training.ranks import Ranks


@dataclass(frozen=True)
class Evaluation:
    """Figures over all K completion tokens of an evaluation, in nats per token."""

    clusters: ClusterSums
    """Of the reverse KL, by prompts, whose tokens are not independent; of a single prompt, by its rollouts."""
    student_entropy: float
    teacher_entropy: float
    completion_tokens: int
    rollouts: Rollouts
    group: Group
    """The same rollouts, with what the teachers saw."""

    @property
    def reverse_kl(self) -> float:
        """Its mean."""
        return self.clusters.mean

    @property
    def standard_error(self) -> float:
        """Of `reverse_kl`, over clusters."""
        return self.clusters.standard_error

    def record(self, prompts: str, labels: Sequence[str] = ()) -> dict[str, Any]:
        """The figures as a JSON object, with what `change_since` needs; `prompts` tells these from other prompts.

        `labels` are the prompts' teachers, by which figures are given too where there are several.
        """
        several = self.clusters.of_label(labels) if len(set(labels)) > 1 else {}
        each = {
            name: {"reverse_kl": _known(of.mean), "standard_error": _known(of.standard_error)}
            for name, of in several.items()
        }
        return ({"by_teacher": each} if each else {}) | {
            "reverse_kl": self.reverse_kl,
            "standard_error": self.standard_error,
            "student_entropy": self.student_entropy,
            "teacher_entropy": self.teacher_entropy,
            "completion_tokens": self.completion_tokens,
            "clusters": {"prompts": prompts, **self.clusters.record()},
        }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def change_since(first: dict[str, Any], last: dict[str, Any]) -> dict[str, float | None]:
    """The change of the reverse KL between two evaluations' records, and its standard error; None where unknown.

    Both draw with the same random numbers, so they are compared cluster by cluster. The error is unknown where a record
    lacks its clusters, as those of older versions do, or where they are of other prompts.
    """
    change, error = last["reverse_kl"] - first["reverse_kl"], math.nan
    old, new = (record.get("clusters") for record in (first, last))
    if old and new and old["prompts"] == new["prompts"] and len(old["sums"]) == len(new["sums"]):
        change, error = ClusterSums.of_record(old).change_to(ClusterSums.of_record(new))
    names = ("reverse_kl_change", "reverse_kl_change_standard_error")
    return {name: _known(x) for name, x in zip(names, (change, error), strict=True)}


@torch.no_grad()
def evaluate(
    engine: RolloutEngine,
    student: ModelParts,
    teachers: Sequence[ModelParts],
    prompts: tuple[Tensor, Tensor],
    *,
    num_rollouts: int,
    max_new_tokens: int,
    seed: int,
    vocab_size: int,
    limits: MemoryLimits,
    teacher_view: TeacherView | None = None,
    sampler: Mapping[str, float] | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Samples from the student on the left-padded `prompts` (ids and mask [B, P]) and scores every token exactly.

    The same seed draws with the same random numbers whatever the training run has sampled in between. `sampler` are
    those of `SamplingOptions` that are others than the engine's.
    """
    device, ranks = student.head.weight.device, ranks or Ranks()
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in prompts)
    rollouts = ranks.generate(
        engine.variant(seed=seed, max_new_tokens=max_new_tokens, **sampler or {}),
        prompt_ids,
        prompt_mask,
        num_rollouts=num_rollouts,
        prompt_keys=torch.arange(len(prompt_ids)),
    )
    group = Group.of(rollouts, teacher_view)
    own = ranks.own_rows(group)
    stats = ranks.in_micro_batches(
        limits,
        "evaluation",
        group,
        own,
        lambda parts: statistics(student, teachers, group, parts, vocab_size=vocab_size),
        by_teacher=True,
    )
    stats = stats._make(ranks.total(torch.stack(list(stats)), own.repeat_interleave(group.completion_lengths)))
    cluster = clusters_of(group).repeat_interleave(group.completion_lengths)
    # Of a teacher on a server, the sampled tokens' own: the same in the mean, with more noise.
    sampled = any(teacher.head is None for teacher in teachers)
    reverse_kl = -stats.reward if sampled else stats.reverse_kl
    return Evaluation(
        clusters=ClusterSums.of(reverse_kl, cluster),
        student_entropy=stats.student_entropy.mean().item(),
        teacher_entropy=stats.teacher_entropy.mean().item(),
        completion_tokens=len(cluster),
        rollouts=rollouts,
        group=group,
    )


@torch.no_grad()
def check_against_itself(model: ModelParts, token_ids: Sequence[int], vocab_size: int) -> None:
    """Scores a model against itself on a prompt: every figure must agree. Raises `ModelError`."""
    if model.elsewhere:  # what can be checked of it was, when it was connected
        return
    ids = torch.tensor([token_ids[:64]], device=model.head.weight.device)
    # The prompt's first token stands for a prompt, the rest for its completion.
    ids = ids.repeat(1, 2) if ids.shape[1] == 1 else ids
    length = torch.tensor([ids.shape[1] - 1])
    group = Group(
        ids[:, :1],
        torch.ones(1, 1, dtype=torch.bool),
        ids[:, 1:],
        length,
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, int(length)),
    )
    rows = [torch.zeros(1, dtype=torch.int64)]
    stats = statistics(model, [model], group, rows, vocab_size=vocab_size)
    worst = torch.stack([stats.reverse_kl.abs().max(), stats.reward.abs().max()]).max().item()
    if not worst <= 1e-4:
        raise ModelError(
            f"the teacher scored against itself gives {worst:.3g} nats instead of 0: its weights are damaged"
        )


def clusters_of(group: Group) -> Tensor:
    """[R]: the rows that an error takes together, those of a prompt.

    Of a single prompt a figure is about that prompt, and its rollouts are what another draw would change.
    """
    return group.prompt_index if len(group.prompt_ids) > 1 else torch.arange(len(group.completion_lengths))


def decode_samples(tokenizer: Any, rollouts: Rollouts, rows: Sequence[int]) -> list[str]:
    """The text of some rows' completions."""
    return [
        tokenizer.decode(
            rollouts.completion_ids[row, : int(rollouts.completion_lengths[row])], skip_special_tokens=True
        )
        for row in rows
    ]
