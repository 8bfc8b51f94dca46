"""From hidden states to gradients: the objective, the weight of each token, and per-token statistics.

Weights are made over the whole group before it is split, so that micro-batches (and ranks) simply add up. The teacher
is scored here too: its hidden states are kept, its logits exist only inside the fused operation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.loss.advantage import advantages, clipped, needs_scores, task_credit
from distill.loss.group import Group
from distill.loss.head_pair import HeadPair, TeacherStates
from distill.loss.mixture import Share, mixed, shares
from distill.loss.model_parts import ModelParts
from distill.loss.options import LossOptions
from distill.runtime import to_device
from distill_kernels import TokenStats


class GroupGradient(NamedTuple):
    """What is known of a group once its gradient has been added up, all of it detached."""

    losses: Tensor  # [2] nats: what rollouts and what written answers are of the group's loss
    stats: TokenStats  # of the group's K tokens, row 0's first
    row_gradients: Tensor | None
    """[R, H] gradient of each row's part of the loss with respect to a shift of all its hidden states."""
    agreement: Tensor
    """[2] of some evenly spaced tokens, for how many teacher and student have the same likeliest one, and how many."""

    @property
    def loss(self) -> Tensor:
        return self.losses.sum()


def token_weights(completion_lengths: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """[K] float32 weights that sum to 1 (or K = 0): of each rollout's mean, or of the mean over all tokens.

    Rows that `counted` [R] bool leaves out weigh 0, and the others share what they would have had.
    """
    lengths = completion_lengths.double()
    kept = (lengths > 0) if counted is None else (lengths > 0) & counted
    per_row = 1 / (lengths * kept).sum() if reduction == "token" else 1 / (lengths * kept.sum())
    return torch.where(kept, per_row, 0).repeat_interleave(completion_lengths).float()


@torch.no_grad()
def score(teachers: Sequence[ModelParts], group: Group, micro_batches: Sequence[Tensor]) -> TeacherStates:
    """What each teacher computes at every token of the completions that it scores."""
    found: TeacherStates = {}
    for teacher, parts in group.by_teacher(micro_batches):
        if teachers[teacher].elsewhere:  # so nothing here has to be small
            parts = [torch.cat(parts)]
        seen = group.seen_by(teacher)
        with teachers[teacher].present():
            for rows in parts:
                hidden = teachers[teacher].hidden(*seen.inputs(rows))
                keys = ((teacher, row) for row in rows.tolist())
                found |= zip(keys, hidden.split(group.completion_lengths[rows].tolist()), strict=True)
    return found


def accumulate_gradients(
    student: ModelParts,
    teachers: Sequence[ModelParts],
    teacher_hidden: TeacherStates,
    group: Group,
    micro_batches: Sequence[Tensor],
    options: LossOptions,
    *,
    vocab_size: int | None = None,
    checkpointing: bool = False,
    own: Tensor | None = None,
) -> GroupGradient:
    """Adds the gradient of a group's loss to the student's `.grad`, one micro-batch at a time.

    `teacher_hidden` is what `score` gave for the group. Rows that are in no micro-batch are another rank's: they add
    nothing, and their figures are 0. Nor do rows add anything that are not this rank's `own` [R] bool on the host.
    """
    counted = group.finished if options.mask_truncated else None
    weights = token_weights(group.completion_lengths, options.reduction, counted)
    task = None if group.task_advantage is None else task_credit(group, weights)
    if own is not None:
        weights = weights.where(own.repeat_interleave(group.completion_lengths), 0)
    pairs = [HeadPair(student, teacher, options.temperature, vocab_size) for teacher in teachers]
    ratio_to, advantage, hidden = options.ratio_to(group), None, None
    alone = options.objective == "rewards"  # then they are all that a token is credited with
    objectives = options.objectives()
    objectives[0]["importance_clip"] = None if ratio_to is None else options.importance_clip
    if needs_scores(options):
        scores, hidden = _score_first(pairs, teacher_hidden, group, micro_batches, options, checkpointing)
        advantage = advantages(scores, group.completion_lengths, group.prompt_index, options)
    found = []
    for rows in micro_batches:
        tokens = group.tokens_of(rows)
        if hidden is None:
            hidden = student.hidden(*group.inputs(rows), checkpointing=checkpointing)
        each = {
            "token_ids": group.valid(group.completion_ids, rows),
            "token_weight": to_device(weights[tokens], hidden.device),
            "sampling_logprob": None if ratio_to is None else group.valid(ratio_to, rows),
            "advantage": None if advantage is None else advantage[to_device(tokens, hidden.device)],
        }
        if task is not None:
            each["advantage" if alone else "task_advantage"] = to_device(task[tokens], hidden.device)
        losses, stats, agreement = _to_teachers(pairs, teacher_hidden, shares(group, rows), hidden, each, objectives)
        if hidden.requires_grad:
            hidden.retain_grad()
        losses.sum().backward()
        shifts = _row_sums(hidden.grad, group.completion_lengths[rows])
        found.append((losses.detach(), stats, shifts, agreement[: None if own is None or own[rows[0]] else 0]))
        hidden = None
    return _summed(found, group, micro_batches)


def _to_teachers(
    pairs: Sequence[HeadPair],
    teacher_hidden: TeacherStates,
    parts: Sequence[Share],
    hidden: Tensor,
    each: dict[str, Tensor | None],
    objectives: tuple[dict, dict],
) -> tuple[Tensor, TokenStats, Tensor]:
    """A micro-batch's loss [2], of rollouts and of written answers, its statistics and which of some tokens agree, from
    `each` of its tokens' inputs."""
    losses, found, agreements = ([], []), [], []
    for share in parts:
        heads, ours = pairs[share.teacher], share.of(hidden)
        theirs = heads.theirs(teacher_hidden, share.teacher, share.rows, ours)
        told = {name: each[name] for name in ("token_ids", "token_weight")} if share.written else each
        inputs = {name: share.of(values) for name, values in told.items()}
        inputs["token_weight"] = share.weigh(inputs["token_weight"])
        loss, stats = heads.loss(ours, theirs, **inputs, **objectives[share.written])
        losses[share.written].append(loss)
        found.append((share, stats))
        agreements.append(heads.agreement(ours.detach(), theirs))
    whole = torch.stack([torch.stack(each or [loss.new_zeros(())]).sum() for each in losses])
    return whole, mixed(found, len(hidden)), torch.cat(agreements)


def _score_first(
    pairs: Sequence[HeadPair],
    teacher_hidden: TeacherStates,
    group: Group,
    micro_batches: Sequence[Tensor],
    options: LossOptions,
    checkpointing: bool,
) -> tuple[TokenStats, Tensor | None]:
    """The statistics of a whole group before its gradient, for advantages that look beyond a token.

    Costs the products of both heads once more and, where the group is more than one micro-batch, a forward of the
    student's body without gradient; the hidden states of a single micro-batch are handed back with their graph.
    """
    whole, found = len(micro_batches) == 1, []
    for rows in micro_batches:
        with torch.set_grad_enabled(whole):
            hidden = pairs[0].student.hidden(*group.inputs(rows), checkpointing=checkpointing and whole)
        ids, parts = group.valid(group.completion_ids, rows), []
        for share in shares(group, rows):
            heads, ours = pairs[share.teacher], share.of(hidden.detach())
            theirs = heads.theirs(teacher_hidden, share.teacher, share.rows, ours)
            stats = heads.statistics(ours, theirs, share.of(ids))
            parts.append((share, stats._replace(reward=clipped(stats.reward, options))))
        found.append(mixed(parts, len(ids)))
    return in_row_order(found, group, micro_batches), hidden if whole else None


def _row_sums(gradient: Tensor | None, lengths: Tensor) -> Tensor | None:
    """[k, H] summed over each row's tokens: [r, H] float32."""
    if gradient is None:
        return None
    # The lengths are ours; to check them, it would wait for the device.
    return torch.segment_reduce(gradient.float(), "sum", lengths=to_device(lengths, gradient.device), unsafe=True)


def _summed(found: list[tuple], group: Group, micro_batches: Sequence[Tensor]) -> GroupGradient:
    """What the micro-batches found, as of the group."""
    device = group.completion_ids.device
    if not found:
        zero = torch.zeros(2, device=device)
        return GroupGradient(zero, in_row_order([], group, micro_batches), None, zero)
    losses, parts, shifts, agreements = zip(*found, strict=True)
    agree, rows = torch.cat(agreements).float(), to_device(torch.cat(list(micro_batches)), device)
    return GroupGradient(
        torch.stack(losses).sum(0),
        in_row_order(parts, group, micro_batches),
        None if shifts[0] is None else _placed(shifts, rows, len(group.completion_lengths)),
        torch.stack([agree.sum(), torch.ones_like(agree).sum()]),
    )


def in_row_order(parts: Sequence[TokenStats], group: Group, micro_batches: Sequence[Tensor]) -> TokenStats:
    """The micro-batches' statistics in row order, 0 for the tokens of rows that are in none."""
    device, K = group.completion_ids.device, int(group.completion_lengths.sum())
    if not parts:
        return TokenStats(*torch.zeros(len(TokenStats._fields), K, device=device))
    tokens = to_device(torch.cat([group.tokens_of(rows) for rows in micro_batches]), device)
    return TokenStats(*(_placed(columns, tokens, K) for columns in zip(*parts, strict=True)))


def _placed(values: Sequence[Tensor], index: Tensor, size: int) -> Tensor:
    """[size, ..] zeros with the concatenated `values` at `index`."""
    found = torch.cat(list(values))
    return found.new_zeros(size, *found.shape[1:]).index_copy(0, index, found)
