"""What `linear_distill_loss` and `linear_reverse_kl` do where the teacher is known by its numbers alone.

A teacher elsewhere says log q(y) of each sampled token y, or a caller gives each token's advantage; either is all that
`sampled_reverse_kl` asks of a teacher, so the student's head is the only one that is multiplied. With an advantage of 1
the loss is the cross entropy of the tokens, weighted.

FLOPs: 6 K V Hs, or 2 K V Hs without gradients and 4 K V Hs with a frozen head. Bytes: the logits are written once and
read twice (once without gradients), and the gradient is written and read twice. Extra memory as in
`linear_distill_loss`.
"""

import torch
from torch import Tensor

from distill_kernels import backend, checks
from distill_kernels.chunks import HeadProducts, accumulation_dtype
from distill_kernels.head_gradients import (
    Gradients,
    new_outputs,
    register_gradients,
    student_chunks,
    weighted_loss,
    write_gradients,
)
from distill_kernels.types import Head


@torch.library.custom_op("distill_kernels::linear_student_loss", mutates_args=())
def linear_student_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    token_weight: Tensor,
    teacher_logprob: Tensor | None,
    sampling_logprob: Tensor | None,
    advantage: Tensor | None,
    task_advantage: Tensor | None,
    needed: list[bool],
    importance_clip: float | None,
    temperature: float,
    vocab_size: int,
    softcap: float | None,
    scale: float,
    workspace_bytes: int | None,
    cast_weights: bool,
) -> Gradients:
    """Loss [], statistics [6, K], and the `needed` gradients of hidden states [K, H], weight and bias (else empty).

    NaN stands for what is not known: the reverse KL, the teacher's entropy, and without `teacher_logprob` that and the
    reward.
    """
    checks.check_token_ids(token_ids, vocab_size)
    K, V = len(hidden), vocab_size
    outputs = new_outputs(hidden, weight, needed, accumulation_dtype(hidden, weight))
    _, stats, *gradients = outputs
    weights = token_weight.to(stats.dtype)
    losses, row_scale = stats.new_empty(2, K)
    student = HeadProducts(weight[:V], hidden, stats.dtype, cast_weights)
    gradients[1][V if K else 0 :].zero_(), gradients[2].zero_()  # the first chunk writes the weight's first V rows
    rounded = any(needed) and student.operand != stats.dtype
    lost = stats.new_empty(K) if rounded else None
    given = {"teacher_logprob": teacher_logprob, "sampling_logprob": sampling_logprob, "advantage": advantage}
    given["task_advantage"] = task_advantage
    head = Head(bias, softcap, scale).first(V)
    for part, logits, grad in student_chunks(student, hidden, any(needed), workspace_bytes):
        factor = weights[part] * (scale / temperature)
        # A row kernel that rounds the gradient weights it first, and leaves a factor that no product rounds.
        weighted = {"token_weight": factor, "lost": lost[part]} if rounded else {}
        backend.implementation("student_rows", hidden.device).student_rows(
            logits,
            token_ids[part],
            stats=stats[:, part],
            losses=losses[part],
            row_scale=row_scale[part],
            grad=grad,
            **{name: None if values is None else values[part] for name, values in given.items()},
            importance_clip=importance_clip,
            temperature=temperature,
            head=head,
            **weighted,
        )
        factor = row_scale[part] if weighted else factor * row_scale[part]
        if grad is not None:
            write_gradients(student, grad, hidden, part, factor, needed, gradients, token_ids, lost)
        del logits, grad  # before the next chunk's
    return weighted_loss(losses, weights), *outputs[1:]


@linear_student_loss.register_fake
def _(hidden, weight, bias, token_ids, token_weight, teacher_logprob, at_sampling, advantage, task, needed, *_):
    return new_outputs(hidden, weight, needed, accumulation_dtype(hidden, weight))


register_gradients(linear_student_loss, needed=9)
