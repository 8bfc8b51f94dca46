"""What `linear_distill_loss` does where a teacher elsewhere names its k likeliest tokens and their log-probabilities.

The vocabulary falls into k + 1 parts: each of these tokens, and all others together. Both models are compared as
distributions over the parts, p of the student and q of the teacher, q's last part being what its k tokens leave of 1:

    reverse_kl    sum_b p_b (log p_b - log q_b)      forward_kl    sum_b q_b (log q_b - log p_b)
    jsd           beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

Each is at most the divergence over the vocabulary (data processing), and equal to it where both models agree within
the last part. The k tokens alone would not do: a student that leaves them has nothing to lose there.

The last part is blind within itself. A sampled token y of it, of which the teacher says log q(y) too, is not: with
g(p_v, q_v) the summand of a divergence, and g' its derivative in p, the expectations under y ~ p of

    g(p_y, q_y) / p_y - g(p_rest, q_rest) / p_rest    and    (g'(p_y, q_y) - g'(p_rest, q_rest)) grad log p_y,

0 where y is one of the k, are what its value and its gradient lack. Both are added where the derivative is a logarithm,
log(p / q) or (1 - beta) log(p / m): these objectives are those of the whole vocabulary in the mean, with noise from the
last part alone. Of `forward_kl` it is -q / p, a noise without bound, for a bias that is small: what q has in that part.

The gradient in the logits of the last part's columns is c p_v / p_rest, one number c a row, so that a pass over the
vocabulary is a sum and, with gradients, a product; all else is arithmetic on [rows, k]. The k columns are taken out
of the logits before the sum, so that p_rest is a sum of what is in it and never 1 less almost 1. What the teacher's
tokens leave is known to LEAST at best, as its log-probabilities are rounded.

FLOPs and bytes as in `linear_student_loss`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill_kernels import backend, checks
from distill_kernels.chunks import HeadProducts, accumulation_dtype
from distill_kernels.head_gradients import (
    Gradients,
    keep_gradients,
    new_outputs,
    scaled_gradients,
    student_chunks,
    weighted_loss,
    write_gradients,
)
from distill_kernels.types import OBJECTIVES, Head

LEAST = 2.0**-20  # of probability


class Parts(NamedTuple):
    """Both models' log-probabilities of r rows' parts, the last one last: [r, k + 1], -inf for what is no part."""

    student: Tensor
    teacher: Tensor


@torch.library.custom_op("distill_kernels::linear_top_loss", mutates_args=())
def linear_top_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    token_weight: Tensor,
    teacher_logprob: Tensor | None,
    top_ids: Tensor,
    top_logprob: Tensor,
    needed: list[bool],
    objective: int,
    beta: float,
    temperature: float,
    vocab_size: int,
    softcap: float | None,
    scale: float,
    workspace_bytes: int | None,
    cast_weights: bool,
) -> Gradients:
    """Loss [], statistics [6, K], and the `needed` gradients of hidden states [K, H], weight and bias (else empty).

    NaN stands for what is not known: the divergence over the vocabulary, the teacher's entropy, and without
    `teacher_logprob` that and the reward.
    """
    checks.check_token_ids(token_ids, vocab_size)
    K, V = len(hidden), vocab_size
    outputs = new_outputs(hidden, weight, needed, accumulation_dtype(hidden, weight))
    _, stats, *gradients = outputs
    stats.fill_(math.nan)
    if teacher_logprob is not None:
        stats[1] = teacher_logprob
    losses, student = stats.new_empty(K), HeadProducts(weight[:V], hidden, stats.dtype, cast_weights)
    gradients[1][V if K else 0 :].zero_(), gradients[2].zero_()  # the first chunk writes the weight's first V rows
    head, implementation = Head(bias, softcap, scale).first(V), backend.implementation("rest_rows", hidden.device)
    weights = token_weight.to(stats.dtype)
    # What a power of two takes out of the weight rounds nothing later, and leaves the gradient in range.
    mantissa, exponent = torch.frexp(weights * (scale / temperature))
    power = torch.ldexp(torch.ones_like(mantissa), exponent)
    beyond = teacher_logprob is not None and OBJECTIVES[objective] != "forward_kl"
    for part, logits, grad in student_chunks(student, hidden, any(needed), workspace_bytes):
        ids, said = _named(top_ids[part], top_logprob[part].to(stats.dtype), V)
        x, slope = _tempered(logits, ids, head, temperature)
        token = token_ids[part, None].clamp(0, V - 1)
        own, own_slope = _tempered(logits, token, head, temperature)
        logits.scatter_(1, ids, -math.inf)
        sums = implementation.rest_sums(logits, head, temperature)
        there = said > -math.inf
        x = x.masked_fill(~there, -math.inf)
        rest, entropy = _of_rest(*sums, there.sum(1), softcap, temperature)
        log_total = torch.logaddexp(rest, x.logsumexp(1))
        both = Parts(
            torch.cat([x, rest[:, None]], 1) - log_total[:, None],
            torch.cat([said, _left(said, rest)[:, None]], 1),
        )
        losses[part], of_top, of_rest = _compared(both, OBJECTIVES[objective], beta)
        outside = (token_ids[part] < 0) | (token_ids[part] >= V)  # on CUDA, where nobody has looked
        logprob = stats[0, part].copy_((own[:, 0] - log_total).masked_fill(outside, math.nan))
        impossible = (logprob == -math.inf) & (stats[1, part] == -math.inf)
        stats[2, part] = (stats[1, part] - logprob).masked_fill_(impossible, 0)
        p = both.student.exp()
        if beyond:
            said_of_own = Parts(logprob, stats[1, part])
            value, excess = _beyond(both, said_of_own, (token == ids).any(1) | outside, OBJECTIVES[objective], beta)
            losses[part] += value
            of_top, of_rest = of_top - excess[:, None] * p[:, :-1], of_rest - excess * p[:, -1]
        stats[4, part] = p[:, -1] * entropy - (p * both.student).masked_fill(p == 0, 0).sum(1)
        if grad is not None:
            implementation.rest_gradient(logits, rest, of_rest * mantissa[part], grad, head, temperature)
            if beyond:
                grad.scatter_add_(1, token, (excess[:, None] * own_slope * mantissa[part, None]).to(grad.dtype))
            grad.scatter_(1, ids, _first(there, of_top * slope * mantissa[part, None]).to(grad.dtype))
            write_gradients(student, grad, hidden, part, power[part], needed, gradients, token_ids, None)
        del logits, grad  # before the next chunk's
    return weighted_loss(losses, weights), *outputs[1:]


def _named(ids: Tensor, said: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Columns [r, k] that exist, and their log-probabilities: of those that do not, the first column and -inf."""
    there = (ids >= 0) & (ids < V) & (said > -math.inf)
    there[:, 0] = True  # one at least is named
    return torch.where(there, ids, ids[:, :1]).clamp(0, V - 1), said.masked_fill(~there, -math.inf)


def _first(there: Tensor, values: Tensor) -> Tensor:
    """Where a column stands in for what is not there, its own value, which is written twice then."""
    return torch.where(there, values, values[:, :1])


def _tempered(logits: Tensor, ids: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """Tempered logits [r, k] of some columns of raw ones [r, V], and the slope of the softcap there."""
    x = logits.gather(1, ids)
    if head.bias is not None:
        x = x + head.bias[ids]
    x = x * head.scale
    slope = torch.ones_like(x)
    if head.softcap is not None:
        bent = torch.tanh(x / head.softcap)
        x, slope = head.softcap * bent, 1 - bent.square()
    return x / temperature, slope


def _of_rest(
    peak: Tensor, total: Tensor, own: Tensor, taken: Tensor, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The last part's log-sum-exp and its own entropy [r], from sums over a row whose `taken` columns are -inf: a
    softcap makes that a number, which is in the sums and small beside the others."""
    if softcap is not None:
        low = -softcap / temperature - peak
        total, own = total - taken * low.exp(), own - taken * low.exp() * low
    empty = ~(total > 0)  # of a row without other columns a sum is NaN on a CPU
    safe = total.masked_fill(empty, 1)
    return (peak + safe.log()).masked_fill(empty, -math.inf), (safe.log() - own / safe).masked_fill(empty, 0)


def _left(said: Tensor, rest: Tensor) -> Tensor:
    """The teacher's log-probability [r] of the last part, -inf where there is none."""
    left = (1 - said.exp().sum(1)).clamp(min=LEAST).log()
    return left.masked_fill(rest == -math.inf, -math.inf)


def _compared(both: Parts, objective: str, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [r], and its gradient in the logits: of the k columns [r, k], and of the last part's the sum [r]."""
    s, t = both
    p, q = s.exp(), t.exp()
    is_part = t > -math.inf
    if objective == "forward_kl":
        loss = _expected(q, t - s, is_part)
        gradient = p * q.sum(1, keepdim=True) - q
    else:
        other = t
        if objective == "jsd":
            other = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
        ratio = (s - other).masked_fill(~is_part | (p == 0), 0)
        kl = _expected(p, ratio, is_part)
        loss, gradient = kl, p * (ratio - kl[:, None])
        if objective == "jsd":
            loss, gradient = beta * _expected(q, t - other, is_part) + (1 - beta) * kl, (1 - beta) * gradient
    finite = loss.isfinite()[:, None]
    gradient = gradient.masked_fill(~(is_part & finite), 0)
    return loss, gradient[:, :-1], gradient[:, -1]


def _beyond(both: Parts, own: Parts, named: Tensor, objective: str, beta: float) -> tuple[Tensor, Tensor]:
    """What r sampled tokens, of which both models say `own` [r], add to loss and gradient: [r] each."""
    of_rest = _summand(Parts(*(of_model[:, -1] for of_model in both)), objective, beta)
    value, excess = (a - b for a, b in zip(_summand(own, objective, beta), of_rest, strict=True))
    none = named | ~(value.isfinite() & excess.isfinite())
    return value.masked_fill(none, 0), excess.masked_fill(none, 0)


def _summand(both: Parts, objective: str, beta: float) -> tuple[Tensor, Tensor]:
    """g / p and g' but for a constant, of log-probabilities."""
    s, t = both
    if objective == "reverse_kl":
        return s - t, s - t
    mixture = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    slope = (1 - beta) * (s - mixture)
    return beta * (t - s).exp() * (t - mixture) + slope, slope


def _expected(p: Tensor, values: Tensor, is_part: Tensor) -> Tensor:
    return (p * values).masked_fill(~is_part | (p == 0), 0).sum(1)


@linear_top_loss.register_fake
def _(hidden, weight, bias, token_ids, token_weight, teacher_logprob, top_ids, top_logprob, needed, *_) -> Gradients:
    return new_outputs(hidden, weight, needed, accumulation_dtype(hidden, weight))


def _keep(ctx, inputs, output) -> None:
    keep_gradients(ctx, inputs[:3], inputs[8], output)


def _scale(ctx, upstream: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    return *scaled_gradients(ctx, upstream), *[None] * 14


torch.library.register_autograd("distill_kernels::linear_top_loss", _scale, setup_context=_keep)
