"""Groups of rollouts and written answers: of a step's B·N sequences, M = round(f·B·N) are answers.

Every sequence counts alike, wherever it is from, so that the gradient is (1 − M/(B·N)) times what rollouts alone would
have in the mean, plus M/(B·N) times that of the answers. To make room, as many rollouts fewer are sampled of each
prompt as can be for all alike; of what is then still too many, the first prompts' last ones are left out.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.config import TrainingConfig
from distill.loss import Group, GroupGradient, LossOptions, Rollouts, TeacherView
from distill.runtime import to_device, to_host
from distill.teachers import TeacherPrompts
from distill.training.answers import Answers
from distill.training.diagnostics import Metrics, step_metrics


class Mixture:
    """What the trainer makes its groups with."""

    def __init__(
        self,
        answers: Answers,
        options: TrainingConfig,
        teacher: TeacherPrompts | None,
        num_teachers: int,
        pad_token_id: int,
    ) -> None:
        """`teacher` is what the teachers see of the training prompts, where that differs from what the student does."""
        self.answers, self._options, self._teacher = answers, options, teacher
        self._num_teachers, self._pad = num_teachers, pad_token_id
        self.scored = options.off_policy_objective != "cross_entropy"

    def __call__(self, rollouts: Rollouts, prompts: Sequence[int], step: int) -> tuple[Rollouts, Group]:
        """Those of a step's rollouts that it learns from, and its group; the answers' rows come last."""
        options, B, N = self._options, len(prompts), self._options.num_rollouts_per_prompt
        # A step with fewer prompts than others has fewer answers.
        M = min(round(options.off_policy_fraction * B * N), B * N - 1)
        rollouts = _first(rollouts, B * N - M)
        own = Group.of(rollouts, self._teacher and self._teacher.view(prompts))
        if M == 0:
            return rollouts, own
        indices = self.answers.stream(step * options.off_policy_sequences, M)
        answers = Group.of(self.answers.rollouts(indices), self.answers.view(indices) if self.scored else None)
        if not self.scored or own.teacher_view or answers.teacher_view:
            own = own._replace(teacher_view=self._told(own, silent=False))
            answers = answers._replace(teacher_view=self._told(answers, silent=not self.scored))
        return rollouts, joined(own, answers, self._pad)

    def _told(self, group: Group, *, silent: bool) -> TeacherView:
        """What the teachers see, in full, with one more that says nothing where answers are not scored."""
        count, ids, mask = self._num_teachers, group.prompt_ids.cpu(), group.prompt_mask
        nothing = torch.full((len(ids), 1), self._pad), torch.ones(len(ids), 1, dtype=torch.bool)
        if silent:
            view = TeacherView([nothing] * count, torch.zeros(len(ids), count))
        elif group.teacher_view is None:
            weight = torch.zeros(len(ids), count)
            weight[:, 0] = 1
            view = TeacherView([(ids, mask), *[nothing] * (count - 1)], weight)
        else:
            view = group.teacher_view
        if self.scored:
            return view
        last = torch.full((len(ids), 1), float(silent))
        return TeacherView([*view.prompts, nothing], torch.cat([view.weight, last], 1))


def _first(rollouts: Rollouts, count: int) -> Rollouts:
    """`count` of them, as many of each prompt as can be, the last ones of the first prompts left out."""
    R, N = len(rollouts.completion_lengths), rollouts.num_rollouts
    if count == R:
        return rollouts
    prompt, number = torch.arange(R) // N, torch.arange(R) % N
    fewer, rest = divmod(R - count, R // N)
    rows = (number < N - fewer - (prompt < rest).long()).nonzero()[:, 0]
    on_device = to_device(rows, rollouts.completion_ids.device)
    tokens = {name: getattr(rollouts, name)[on_device] for name in ("completion_ids", "logprob", "sampling_logprob")}
    each = ("completion_lengths", "finished", "rewards", "task_advantage")
    of_rows = {name: values[rows] for name in each if (values := getattr(rollouts, name)) is not None}
    return replace(rollouts, **tokens, **of_rows, rows=rows)


def joined(own: Group, answers: Group, pad_token_id: int) -> Group:
    """One group of rollouts and answers, which are marked as written and have no part in a task's reward."""
    tasks = own.task_advantage
    if tasks is not None:
        tasks = torch.cat([tasks, tasks.new_zeros(len(answers.completion_lengths))])
    view = None
    if own.teacher_view is not None:
        pairs = zip(own.teacher_view.prompts, answers.teacher_view.prompts, strict=True)
        prompts = [(_below(a[0], b[0], pad_token_id, left=True), _below(a[1], b[1], 0, left=True)) for a, b in pairs]
        view = TeacherView(prompts, torch.cat([own.teacher_view.weight, answers.teacher_view.weight]))
    return Group(
        _below(own.prompt_ids, answers.prompt_ids, pad_token_id, left=True),
        _below(own.prompt_mask, answers.prompt_mask, 0, left=True),
        _below(own.completion_ids, answers.completion_ids, pad_token_id),
        torch.cat([own.completion_lengths, answers.completion_lengths]),
        torch.cat([own.prompt_index, answers.prompt_index + len(own.prompt_mask)]),
        _below(own.logprob, answers.logprob, 0),
        _below(own.sampling_logprob, answers.sampling_logprob, 0),
        torch.cat([own.finished, answers.finished]),
        view,
        tasks,
        torch.cat([torch.zeros_like(own.finished), torch.ones_like(answers.finished)]),
    )


def _below(one: Tensor, other: Tensor, value: int, *, left: bool = False) -> Tensor:
    """[n + m, ..] of [n, ..] and [m, ..], the narrower padded."""
    width = max(one.shape[1], other.shape[1])
    gaps = [(width - each.shape[1], 0) if left else (0, width - each.shape[1]) for each in (one, other)]
    return torch.cat([pad(each, gap, value=value) for each, gap in zip((one, other), gaps, strict=True)])


def mixture_metrics(
    result: GroupGradient, group: Group, grad_norm: Tensor, options: LossOptions
) -> tuple[Metrics, list[float]]:
    """As `step_metrics`, of the rollouts; `loss` and `grad_norm` are of the whole group, and what begins with
    `off_policy` is of the answers."""
    if group.written is None:
        metrics, row_reverse_kl = step_metrics(result, group, grad_norm, options)
        return metrics | {"off_policy_sequences": 0, "off_policy_tokens": 0}, row_reverse_kl
    tokens = group.written.repeat_interleave(group.completion_lengths)
    rollouts, answers = (to_device(mask.nonzero()[:, 0], result.loss.device) for mask in (~tokens, tokens))
    stats = result.stats
    own = result._replace(
        stats=stats._make(values[rollouts] for values in stats),
        row_gradients=None if result.row_gradients is None else result.row_gradients[: int((~group.written).sum())],
    )
    metrics, row_reverse_kl = step_metrics(own, without_answers(group), grad_norm, options)
    of_answers = to_host(
        {
            "off_policy_loss": result.losses[1],
            "off_policy_cross_entropy": -stats.student_logprob[answers].mean(),
            "off_policy_reverse_kl_exact": stats.reverse_kl[answers].mean(),
        }
    )
    counts = {"off_policy_sequences": int(group.written.sum()), "off_policy_tokens": len(answers)}
    return metrics | of_answers | counts, row_reverse_kl


def without_answers(group: Group) -> Group:
    """The rollouts of a group that `joined` made."""
    R = int((~group.written).sum())
    B = len(group.prompt_mask) - (len(group.written) - R)
    rows = ("completion_ids", "completion_lengths", "prompt_index", "logprob", "sampling_logprob", "finished")
    tasks = None if group.task_advantage is None else group.task_advantage[:R]
    prompts = {"prompt_ids": group.prompt_ids[:B], "prompt_mask": group.prompt_mask[:B]}
    own = {name: getattr(group, name)[:R] for name in rows}
    return group._replace(**prompts, **own, teacher_view=None, task_advantage=tasks, written=None)
