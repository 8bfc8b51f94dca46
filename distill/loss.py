"""From hidden states to gradients: the objective, the weight of each token, and per-token statistics.

Weights are made over the whole group before it is split, so that micro-batches (and ranks) simply add up. The teacher
is scored here too: its hidden states are kept, its logits exist only inside the fused operation.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from distill.advantage import advantages, needs_scores
from distill.forward import completion_hidden
from distill.head_pair import HeadPair
from distill_kernels import TokenStats, linear_distill_loss

if TYPE_CHECKING:
    from distill.rollout import Rollouts


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

    def ratio_to(self, group: "Group") -> Tensor | None:
        """[R, T] log-probabilities below the importance ratio, None where there is no ratio."""
        if self.objective != "sampled_reverse_kl" or self.importance_clip is None:
            return None
        return {"none": None, "stale": group.logprob, "sampler": group.sampling_logprob}[self.importance_sampling]


class ModelParts(NamedTuple):
    """A model as it is computed with: body, head (a `models.Head`), and the precision of the arithmetic."""

    body: nn.Module
    head: NamedTuple
    dtype: torch.dtype
    present: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """Surrounds a phase in which the body computes: it may live elsewhere the rest of the time."""
    sampled_only = (
        False  # whether `hidden` gives log-probabilities of the sampled tokens [K, 1], and nothing else is known
    )

    def hidden(self, *rollouts, **options) -> Tensor:
        """`completion_hidden` of this model in its precision, whatever the precision of its weights."""
        mixed = self.head.weight.dtype != self.dtype
        context = torch.autocast(self.head.weight.device.type, self.dtype) if mixed else contextlib.nullcontext()
        with context:
            return completion_hidden(self.body, *rollouts, **options).to(self.dtype)

    def head_arguments(self, name: str) -> dict:
        """The head as keyword arguments of the fused operations, each beginning with `name`."""
        head = self.head
        return {f"{name}_bias": head.bias, f"{name}_softcap": head.softcap, f"{name}_scale": head.scale}


class TeacherView(NamedTuple):
    """Which teacher scores each of B prompts, and what it sees in the prompt's place."""

    prompt_ids: Tensor  # [B, P'] int64, left-padded
    prompt_mask: Tensor  # [B, P'] bool, on the host
    teacher: Tensor  # [B] int64, on the host


class Group(NamedTuple):
    """Rollouts that share one optimizer step. Lengths and index stay on the host, so that nothing waits for them."""

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool, on the host
    completion_ids: Tensor  # [R, T] int64, right-padded
    completion_lengths: Tensor  # [R] int64, on the host
    prompt_index: Tensor  # [R] int64, on the host
    logprob: Tensor  # [R, T] float32: the student's at sampling
    sampling_logprob: Tensor | None = None  # [R, T] float32: of the distribution sampled from
    finished: Tensor | None = None  # [R] bool, on the host: not cut by length
    teacher_view: TeacherView | None = None  # None: the first teacher sees what the student sees

    @classmethod
    def of(cls, rollouts: "Rollouts", teacher_view: TeacherView | None = None) -> "Group":
        """The group that some rollouts form."""
        mask, lengths = rollouts.prompt_mask.cpu(), rollouts.completion_lengths.cpu()
        index = torch.arange(len(lengths)) // rollouts.num_rollouts
        return cls(
            rollouts.prompt_ids,
            mask,
            rollouts.completion_ids,
            lengths,
            index,
            rollouts.logprob,
            rollouts.sampling_logprob,
            rollouts.finished.cpu(),
            teacher_view,
        )

    @property
    def lengths(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the prompts, of the completions, and which prompt each row has: what micro-batches are cut by."""
        return self.prompt_mask.sum(1), self.completion_lengths, self.prompt_index

    @property
    def for_teachers(self) -> "Group":
        """The same completions after the prompts that the teachers see."""
        if self.teacher_view is None:
            return self
        device, (prompt_ids, prompt_mask, _) = self.prompt_ids.device, self.teacher_view
        return self._replace(prompt_ids=prompt_ids.to(device, non_blocking=True), prompt_mask=prompt_mask)

    def teacher_of(self, rows: Tensor) -> int:
        """The teacher of some rows that have one teacher."""
        return 0 if self.teacher_view is None else int(self.teacher_view.teacher[self.prompt_index[rows[0]]])

    def by_teacher(self, micro_batches: Sequence[Tensor]) -> list[Tensor]:
        """Micro-batches cut where teachers differ, those of the first teacher first."""
        if self.teacher_view is None:
            return list(micro_batches)
        of_row = self.teacher_view.teacher[self.prompt_index]
        parts = (rows[of_row[rows] == teacher] for teacher in of_row.unique() for rows in micro_batches)
        return [rows for rows in parts if len(rows)]

    @property
    def starts(self) -> Tensor:
        """[R + 1] int64: where each row begins among the K valid tokens."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.completion_lengths.cumsum(0)])

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Indices among the K valid tokens of the given rows' tokens, in the order of `rows`."""
        starts = self.starts
        return torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])

    def valid(self, values: Tensor, rows: Tensor) -> Tensor:
        """[R, T] to the valid entries of `rows`, flattened: masked by length, never by the padding id."""
        lengths = self.completion_lengths[rows]
        mask = torch.arange(values.shape[1]) < lengths[:, None]
        index = (rows[:, None] * values.shape[1] + torch.arange(values.shape[1]))[mask]
        return values.flatten()[index.to(values.device, non_blocking=True)]

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What `completion_hidden` takes, for some rows and the prompts they need."""
        prompts, index = self.prompt_index[rows].unique(return_inverse=True)
        lengths = self.completion_lengths[rows]
        device = self.completion_ids.device
        return (
            self.prompt_ids[prompts.to(device)],
            self.prompt_mask[prompts],
            self.completion_ids[rows.to(device), : max(1, int(lengths.max()))],
            lengths,
            index,
        )


class GroupGradient(NamedTuple):
    """What is known of a group once its gradient has been added up, all of it detached."""

    loss: Tensor
    """[] nats."""
    stats: TokenStats
    """Of the group's K tokens, row 0's first."""
    row_gradients: Tensor | None
    """[R, H] gradient of each row's part of the loss with respect to a shift of all its hidden states."""
    agreement: Tensor
    """[] fraction of some evenly spaced tokens for which teacher and student have the same likeliest token."""


def token_weights(completion_lengths: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """[K] float32 weights that sum to 1 (or K = 0): of each rollout's mean, or of the mean over all tokens.

    Rows that `counted` [R] bool leaves out weigh 0, and the others share what they would have had.
    """
    lengths = completion_lengths.double()
    kept = (lengths > 0) if counted is None else (lengths > 0) & counted
    per_row = 1 / (lengths * kept).sum() if reduction == "token" else 1 / (lengths * kept.sum())
    return torch.where(kept, per_row, 0).repeat_interleave(completion_lengths).float()


@torch.no_grad()
def score(teachers: Sequence[ModelParts], group: Group, micro_batches: Sequence[Tensor]) -> list[Tensor]:
    """Each row's hidden states [T_r, Ht] of its teacher, at every token of its completion."""
    seen, found = group.for_teachers, {}
    for index, parts in itertools.groupby(group.by_teacher(micro_batches), group.teacher_of):
        if teachers[index].sampled_only:  # elsewhere, so nothing here has to be small
            parts = [torch.cat(list(parts))]
        with teachers[index].present():
            for rows in parts:
                hidden = teachers[index].hidden(*seen.inputs(rows))
                found |= zip(rows.tolist(), hidden.split(group.completion_lengths[rows].tolist()), strict=True)
    return [found[row] for row in range(len(found))]


def accumulate_gradients(
    student: ModelParts,
    teachers: Sequence[ModelParts],
    teacher_hidden: Sequence[Tensor],
    group: Group,
    micro_batches: Sequence[Tensor],
    options: LossOptions,
    *,
    vocab_size: int | None = None,
    checkpointing: bool = False,
) -> GroupGradient:
    """Adds the gradient of a group's loss to the student's `.grad`, one micro-batch at a time.

    `teacher_hidden` is what `score` gave for the group.
    """
    weights = token_weights(
        group.completion_lengths, options.reduction, group.finished if options.mask_truncated else None
    )
    pairs = [HeadPair(student, teacher, options.temperature, vocab_size) for teacher in teachers]
    micro_batches = group.by_teacher(micro_batches)
    ratio_to, advantage, hidden = options.ratio_to(group), None, None
    if needs_scores(options):
        scores, hidden = _score_first(pairs, teacher_hidden, group, micro_batches, checkpointing)
        advantage = advantages(scores, group.completion_lengths, group.prompt_index, options)
    losses, parts, shifts, agreements = [], [], [], []
    for rows in micro_batches:
        tokens = group.tokens_of(rows)
        if hidden is None:
            hidden = student.hidden(*group.inputs(rows), checkpointing=checkpointing)
        device, heads = hidden.device, pairs[group.teacher_of(rows)]
        theirs, ids = torch.cat([teacher_hidden[row] for row in rows]), group.valid(group.completion_ids, rows)
        credit = None if advantage is None else advantage[tokens.to(device)]
        if credit is None and heads.teacher.sampled_only:
            credit = heads.statistics(hidden.detach(), theirs, ids).reward
        loss, stats = linear_distill_loss(
            *heads.inputs(hidden, theirs),
            ids,
            weights[tokens].to(device),
            objective=options.objective,
            sampling_logprob=None if ratio_to is None else group.valid(ratio_to, rows),
            importance_clip=None if ratio_to is None else options.importance_clip,
            advantage=credit,
            beta=options.beta,
            **heads.options(),
        )
        if hidden.requires_grad:
            hidden.retain_grad()
        loss.backward()
        losses.append(loss.detach())
        parts.append(heads.completed(stats, theirs))
        if hidden.grad is not None:
            lengths = group.completion_lengths[rows].to(device, non_blocking=True)
            # The lengths are ours; to check them, it would wait for the device.
            shifts.append(torch.segment_reduce(hidden.grad.float(), "sum", lengths=lengths, unsafe=True))
        agreements.append(heads.agreement(hidden.detach(), theirs))
        hidden = None
    rows = torch.cat(list(micro_batches)).argsort().to(device, non_blocking=True)
    return GroupGradient(
        torch.stack(losses).sum(),
        _merged(parts, group, micro_batches),
        torch.cat(shifts)[rows] if shifts else None,
        torch.cat(agreements).float().mean(),
    )


@torch.no_grad()
def statistics(
    student: ModelParts,
    teachers: Sequence[ModelParts],
    group: Group,
    micro_batches: Sequence[Tensor],
    *,
    vocab_size: int | None = None,
    teacher_hidden: Sequence[Tensor] | None = None,
) -> TokenStats:
    """The statistics of a group's K tokens without gradients, row 0's first.

    `teacher_hidden` is what `score` gave for the group, where it is known.
    """
    seen, parts, micro_batches = group.for_teachers, [], group.by_teacher(micro_batches)
    for index, of_teacher in itertools.groupby(micro_batches, group.teacher_of):
        heads = HeadPair(student, teachers[index], 1.0, vocab_size)
        with heads.teacher.present():
            for rows in of_teacher:
                known = teacher_hidden and torch.cat([teacher_hidden[row] for row in rows.tolist()])
                theirs = heads.teacher.hidden(*seen.inputs(rows)) if known is None else known
                hidden, ids = student.hidden(*group.inputs(rows)), group.valid(group.completion_ids, rows)
                parts.append(heads.statistics(hidden, theirs, ids))
    return _merged(parts, group, micro_batches)


def _score_first(
    pairs: Sequence[HeadPair],
    teacher_hidden: Sequence[Tensor],
    group: Group,
    micro_batches: Sequence[Tensor],
    checkpointing: bool,
) -> tuple[TokenStats, Tensor | None]:
    """The statistics of a whole group before its gradient, for advantages that look beyond a token.

    Costs the products of both heads once more and, where the group is more than one micro-batch, a forward of the
    student's body without gradient; the hidden states of a single micro-batch are handed back with their graph.
    """
    whole, parts = len(micro_batches) == 1, []
    for rows in micro_batches:
        heads = pairs[group.teacher_of(rows)]
        with torch.set_grad_enabled(whole):
            hidden = heads.student.hidden(*group.inputs(rows), checkpointing=checkpointing and whole)
        theirs = torch.cat([teacher_hidden[row] for row in rows])
        parts.append(heads.statistics(hidden.detach(), theirs, group.valid(group.completion_ids, rows)))
    return _merged(parts, group, micro_batches), hidden if whole else None


def _merged(parts: list[TokenStats], group: Group, micro_batches: Sequence[Tensor]) -> TokenStats:
    """The micro-batches' statistics in row order."""
    order = _inverse(group, micro_batches)
    return TokenStats(*(torch.cat(columns)[order.to(columns[0].device)] for columns in zip(*parts, strict=True)))


def _inverse(group: Group, micro_batches: Sequence[Tensor]) -> Tensor:
    """The permutation from the micro-batches' token order back to row order."""
    return torch.cat([group.tokens_of(rows) for rows in micro_batches]).argsort()
