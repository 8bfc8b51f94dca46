"""`linear_distill_loss`: distillation loss of K tokens from hidden states and head weights, in one pass.

With p the student's and q the teacher's distribution at z = softcap(scale (h W^T + b)) / temperature, y the token:

    sampled_reverse_kl   -rho A log p(y)           gradient in z   rho A (p - onehot(y))
    reverse_kl           KL(p || q)                                p (log p - log q - KL(p || q))
    forward_kl           KL(q || p)                                p - q
    jsd                  beta KL(q || m) + (1 - beta) KL(p || m)   (1 - beta) p (log p - log m - KL(p || m))

A = log q(y) - log p(y), or the `advantage` that the caller gives, and rho = min(exp(log p(y) - sampling_logprob),
importance_clip) are constants of the gradient; m = beta q + (1 - beta) p (Agarwal et al. 2023, eq. 2). Where a
`task_advantage` B is given, -rho B log p(y) is added to any of them, in the same pass. The loss is linear in the losses
of the tokens with known weights, so the gradient needs nothing from outside but one number: a chunk of rows is
multiplied by both heads, one row kernel writes the student's logit gradient, and that goes straight into both
gradients. The backward pass multiplies them by the upstream gradient; nothing is computed twice, no [K, V] tensor
exists. Where `student_product.applies`, on Hopper, the student's product itself writes the logit gradient. In half
precision p - onehot(y) loses part of its largest entry, which either way goes into the gradients all the same.

FLOPs: 2 K V (3 Hs + Ht), or 2 K V (Hs + Ht) without gradients and 2 K V (2 Hs + Ht) with a frozen head. Bytes: the
logits buffers are written once, read twice (once where no gradient is asked for), and the gradient is written and
read twice; the float32 weight gradient is written once a chunk and read in all but the first. From the student's
product, only the teacher's buffer is, written and read once.
Extra memory, whatever K is: the workspace of `chunks.WORKSPACE_BYTES` and the float32 gradients [K, Hs] and [Vs, Hs].
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distill_kernels import backend, checks, student_product
from distill_kernels.chunks import HeadProducts, accumulation_dtype, chunks, row_buffer, rows_per_chunk
from distill_kernels.head_gradients import (
    Gradients,
    new_outputs,
    register_gradients,
    weighted_loss,
    write_gradients,
)
from distill_kernels.linear_student_loss import linear_student_loss
from distill_kernels.linear_top_loss import linear_top_loss
from distill_kernels.types import OBJECTIVES, Head, TokenStats, TopTokens


@torch.library.custom_op("distill_kernels::linear_distill_loss", mutates_args=())
def _linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    token_ids: Tensor,
    token_weight: Tensor,
    sampling_logprob: Tensor | None,
    advantage: Tensor | None,
    task_advantage: Tensor | None,
    needed: list[bool],
    objective: int,
    importance_clip: float | None,
    beta: float,
    temperature: float,
    vocab_size: int,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_scale: float,
    teacher_scale: float,
    workspace_bytes: int | None,
    cast_weights: bool,
) -> Gradients:
    """Loss [], statistics [6, K], and the `needed` gradients of student hidden states, weight and bias (else empty)."""
    checks.check_token_ids(token_ids, vocab_size)
    K, V = student_hidden.shape[0], vocab_size
    dtype = accumulation_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    outputs = new_outputs(student_hidden, student_weight, needed, dtype)
    _, stats, *gradients = outputs
    weights = token_weight.to(stats.dtype)
    losses, row_scale = stats.new_empty(2, K)
    student = HeadProducts(student_weight[:V], student_hidden, stats.dtype, cast_weights)
    teacher = HeadProducts(teacher_weight[:V], teacher_hidden, stats.dtype, cast_weights)
    gradients[1][V if K else 0 :].zero_(), gradients[2].zero_()  # the first chunk writes the weight's first V rows
    heads = {
        "student_head": Head(student_bias, student_softcap, student_scale).first(V),
        "teacher_head": Head(teacher_bias, teacher_softcap, teacher_scale).first(V),
    }
    tasked = task_advantage is not None
    way = _way(student, student_hidden, heads, temperature, objective, any(needed), workspace_bytes, tasked)
    teacher_room = teacher.room(way.rows)
    sampled = tasked or OBJECTIVES[objective] == "sampled_reverse_kl"
    lost = stats.new_empty(K) if way.rounds and sampled else None
    for part in chunks(K, way.rows):
        factor = weights[part] * (student_scale / temperature)
        # A row kernel that rounds the gradient weights it first, and leaves a factor that no product rounds.
        weighted = {"token_weight": factor, "lost": None if lost is None else lost[part]} if way.rounds else {}
        task = {"task_advantage": task_advantage[part]} if tasked else {}
        grad = way.distill(
            student_hidden[part],
            teacher.logits(teacher_hidden[part], teacher_room),
            token_ids=token_ids[part],
            sampling_logprob=None if sampling_logprob is None else sampling_logprob[part],
            stats=stats[:, part],
            losses=losses[part],
            row_scale=row_scale[part],
            advantage=None if advantage is None else advantage[part],
            objective=objective,
            importance_clip=importance_clip,
            beta=beta,
            temperature=temperature,
            **heads,
            **weighted,
            **task,
        )
        factor = row_scale[part] if weighted else weights[part] * row_scale[part] * (student_scale / temperature)  # [k]
        if grad is not None:
            write_gradients(student, grad, student_hidden, part, factor, needed, gradients, token_ids, lost)
        del grad  # before the next chunk's logits
    return weighted_loss(losses, weights), *outputs[1:]


class _Way(NamedTuple):
    """How a chunk of rows is done."""

    rows: int
    distill: Callable[..., Tensor | None]
    """Hidden states [k, Hs] and teacher's logits [k, V] to the student's logits' gradient, if one is asked for."""
    rounds: bool
    """Whether it rounds that, as weighted by its `token_weight`."""


def _way(
    student: HeadProducts,
    hidden: Tensor,
    heads: Mapping[str, Head],
    temperature: float,
    objective: int,
    gradient: bool,
    workspace_bytes: int | None,
    tasked: bool,
) -> _Way:
    K, V = len(hidden), len(student.weight)
    if not tasked and student_product.applies(student, hidden, heads.values(), temperature, objective, gradient):
        rows = student_product.rows(K, V, student, workspace_bytes)
        return _Way(rows, student_product.way(student, rows, V), rounds=False)
    dtype, operand = student.accumulate, student.operand
    rounds = gradient and operand != dtype
    rows = rows_per_chunk(K, V, 2 * dtype.itemsize + rounds * operand.itemsize, workspace_bytes, hidden.device)
    room = student.room(rows)
    rounded = row_buffer(rows, V, operand, hidden.device) if rounds else None

    def distill(hidden: Tensor, teacher: Tensor, **options) -> Tensor | None:
        """The gradient takes the logits' place if the products take what the logits are."""
        logits = student.logits(hidden, room)
        grad = None if not gradient else logits if rounded is None else rounded[: len(logits)]
        backend.implementation("rows", hidden.device).distill_rows(logits, teacher, grad=grad, **options)
        return grad

    return _Way(rows, distill, rounds)


@_linear_distill_loss.register_fake
def _(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, *rest) -> Gradients:
    dtype = accumulation_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    return new_outputs(student_hidden, student_weight, rest[5], dtype)


register_gradients(_linear_distill_loss, needed=11)


def _check_objective(
    objective: str,
    sampling_logprob: Tensor | None,
    importance_clip: float | None,
    advantage: Tensor | None,
    tasked: bool,
    beta: float,
    teacher: bool,
    teacher_logprob: Tensor | None,
    teacher_top: TopTokens | None,
) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; found {objective!r}")
    own = {"advantage": advantage}
    if not tasked:
        own |= {"sampling_logprob": sampling_logprob, "importance_clip": importance_clip}
    if objective != "sampled_reverse_kl" and any(value is not None for value in own.values()):
        raise ValueError(f"{', '.join(own)} belong to sampled_reverse_kl; found {objective!r}")
    if objective == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1; found {beta}. Its limits are forward_kl and reverse_kl")
    sampled = objective == "sampled_reverse_kl"
    if not teacher and not sampled and teacher_top is None:
        raise ValueError(
            f"without teacher_hidden there is sampled_reverse_kl only, and with teacher_top the others; found "
            f"objective {objective!r}"
        )
    if teacher_top is not None and (teacher or sampled):
        what = "a teacher that is here" if teacher else "sampled_reverse_kl, which asks of the sampled tokens only"
        raise ValueError(f"teacher_top is for a teacher elsewhere and whole distributions; found {what}")
    if not teacher and sampled and teacher_logprob is None and advantage is None:
        raise ValueError("without teacher_hidden the loss needs teacher_logprob or advantage: pass one of them")


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    token_ids: Tensor,
    token_weight: Tensor,
    *,
    teacher_logprob: Tensor | None = None,
    teacher_top: TopTokens | None = None,
    objective: str = "sampled_reverse_kl",
    sampling_logprob: Tensor | None = None,
    importance_clip: float | None = None,
    advantage: Tensor | None = None,
    task_advantage: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    workspace_bytes: int | None = None,
    cast_weights: bool = False,
) -> tuple[Tensor, TokenStats]:
    """sum_k token_weight[k] * loss_k in nats, a float32 scalar, and the detached statistics, [K] float32 each.

    Gradients go to student_hidden, student_weight and student_bias, each unless it is frozen; none are computed
    where autograd records nothing. The other arguments are constants. Weights tied to an embedding need no care:
    the gradient is returned to autograd, which adds it to the embedding's.

    student_hidden [K, Hs], student_weight [Vs, Hs], teacher_hidden [K, Ht], teacher_weight [Vt, Ht]: float32,
    bfloat16 or float16, float64 on a CPU; each may have its own (a product runs in the wider of its two, or with
    `cast_weights` in the hidden states' dtype: float32 master weights in half precision, and their gradient still
    float32, which is a sum of float32 products of half-precision numbers and never rounded to fewer bits).
    token_ids [K] int64. token_weight [K], 0 for a token to leave out, whatever its loss is. sampling_logprob [K],
    nats, importance_clip and advantage are for `sampled_reverse_kl` only; without the first, rho is 1. advantage [K],
    nats, takes the place of the token's reward in the loss and its gradient, not in the statistics. task_advantage [K],
    nats, adds its own sampled term to any objective, with the same rho, which may then be given. beta, for `jsd`,
    lies between 0 and 1, both excluded: there it is forward_kl and reverse_kl, scaled to 0. `vocab_size` is the number
    of leading columns that both models share; columns past it have gradient 0. `workspace_bytes` bounds the buffers.

    A teacher elsewhere: teacher_hidden and teacher_weight are None, teacher_logprob [K], nats, is what it says of the
    tokens at this temperature. The statistics that nobody knows are NaN. An advantage may take its place too: with 1
    the loss is the tokens' cross entropy. `sampled_reverse_kl` only, unless `teacher_top` names the teacher's likeliest
    tokens: then the others are those to the nearest teacher that fits, see `linear_top_loss`.

    A token whose divergence is infinite makes the loss infinite and has gradient 0.
    Raises ValueError and IndexError as `linear_reverse_kl` does.
    """
    _check_objective(
        objective, sampling_logprob, importance_clip, advantage, task_advantage is not None, beta,
        teacher_hidden is not None, teacher_logprob, teacher_top,
    )  # fmt: skip
    vectors = {
        "token_weight": token_weight,
        "teacher_logprob": teacher_logprob,
        "sampling_logprob": sampling_logprob,
        "advantage": advantage,
        "task_advantage": task_advantage,
    }
    student, teacher = (
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
    )
    V = checks.check_linear(
        student,
        teacher,
        token_ids,
        vocab_size,
        vectors=vectors,
        numbers={
            "temperature": temperature,
            "student_softcap": student_softcap,
            "teacher_softcap": teacher_softcap,
            "importance_clip": importance_clip,
        },
        teacher_scale=teacher_scale,
    )
    needed = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in student]
    weight, *given = (None if vector is None else vector.detach() for vector in vectors.values())
    if teacher_top is not None:
        checks.check_top(teacher_top, token_ids, V)
        top = teacher_top.token_ids, teacher_top.logprob.detach(), needed, OBJECTIVES.index(objective), beta
        options = (temperature, V, student_softcap, student_scale, workspace_bytes, cast_weights)
        loss, stats, *_ = linear_top_loss(*student, token_ids, weight, given[0], *top, *options)
        if task_advantage is not None:  # by a product of its own: the teacher's parts have no entry for the token
            options = (importance_clip, *options)
            sampled, *_ = linear_student_loss(
                *student, token_ids, weight, None, given[1], given[3], None, needed, *options
            )
            loss = loss + sampled
        return loss, TokenStats(*stats.unbind(0))
    if teacher_hidden is None:
        options = (importance_clip, temperature, V, student_softcap, student_scale, workspace_bytes, cast_weights)
        loss, stats, *_ = linear_student_loss(*student, token_ids, weight, *given, needed, *options)
        return loss, TokenStats(*stats.unbind(0))
    loss, stats, *_ = _linear_distill_loss(
        *student,
        *(None if tensor is None else tensor.detach() for tensor in teacher),
        token_ids,
        weight,
        *given[1:],
        needed,
        OBJECTIVES.index(objective),
        importance_clip,
        beta,
        temperature,
        V,
        student_softcap,
        teacher_softcap,
        student_scale,
        teacher_scale,
        workspace_bytes,
        cast_weights,
    )
    return loss, TokenStats(*stats.unbind(0))
