"""Held-out evaluation: the exact reverse KL on the student's own completions of prompts it never trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.loss import Group, ModelParts, TeacherView, statistics
from distill.memory import MemoryLimits
from distill.models import ModelError
from distill.rollout import RolloutEngine, Rollouts


@dataclass(frozen=True)
class Evaluation:
    """Figures over all K completion tokens of an evaluation, in nats per token."""

    reverse_kl: float
    standard_error: float
    """Of `reverse_kl`, over prompts: the tokens of one prompt are not independent."""
    student_entropy: float
    teacher_entropy: float
    completion_tokens: int
    rollouts: Rollouts

    def record(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return {name: value for name, value in vars(self).items() if name != "rollouts"}


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
) -> Evaluation:
    """Samples from the student on the left-padded `prompts` (ids and mask [B, P]) and scores every token exactly.

    The same seed draws with the same random numbers whatever the training run has sampled in between.
    """
    device = student.head.weight.device
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in prompts)
    rollouts = engine.variant(seed=seed, max_new_tokens=max_new_tokens).generate(
        prompt_ids, prompt_mask, num_rollouts=num_rollouts, prompt_keys=torch.arange(len(prompt_ids))
    )
    group = Group.of(rollouts, teacher_view)
    stats = limits.in_micro_batches(
        "evaluation",
        group.for_teachers.lengths,
        lambda parts: statistics(student, teachers, group, parts, vocab_size=vocab_size),
    )
    prompt_of_token = group.prompt_index.repeat_interleave(group.completion_lengths)
    mean = stats.reverse_kl.double().mean()
    return Evaluation(
        reverse_kl=mean.item(),
        standard_error=_clustered_error((stats.reverse_kl.double() - mean).cpu(), prompt_of_token, len(prompt_ids)),
        student_entropy=stats.student_entropy.mean().item(),
        teacher_entropy=stats.teacher_entropy.mean().item(),
        completion_tokens=len(prompt_of_token),
        rollouts=rollouts,
    )


@torch.no_grad()
def check_against_itself(model: ModelParts, token_ids: Sequence[int], vocab_size: int) -> None:
    """Scores a model against itself on a prompt: every figure must agree. Raises `ModelError`."""
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


def _clustered_error(residuals: Tensor, cluster: Tensor, count: int) -> float:
    """Standard error of a mean whose terms are independent only between clusters (the ratio estimator's)."""
    if count < 2:
        return float("nan")
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster, residuals)
    return ((sums.square().sum() * count / (count - 1)).sqrt() / len(residuals)).item()


def decode_samples(tokenizer: Any, rollouts: Rollouts, rows: Sequence[int]) -> list[str]:
    """The text of some rows' completions."""
    return [
        tokenizer.decode(
            rollouts.completion_ids[row, : int(rollouts.completion_lengths[row])], skip_special_tokens=True
        )
        for row in rows
    ]
