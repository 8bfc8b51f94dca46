"""What `linear_distill_loss` does where a teacher elsewhere names its k likeliest tokens and their log-probabilities.

Of the student's p all is known. Of the teacher's q known are these k numbers, that all other tokens together have what
they leave of 1, and that none of those has more than the least of the k. The loss is the divergence

    reverse_kl    sum_v p_v (log p_v - log q_v)      forward_kl    sum_v q_v (log q_v - log p_v)
    jsd           beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

to the nearest q that fits: in each case that with q_v = min(q_least, c p_v) for the others, as f-divergences are least
where q / p is one number. So the vocabulary falls into parts: the k tokens, each other one to which the student gives
so much that q_least limits it, and the rest, which counts as one. The loss is at most the divergence over the
vocabulary, and equal to it where all are named. The k tokens alone would not do: a student that leaves them has nothing
to lose there. Nor would k and a rest without limits: on one wrong token a student could keep all that the k leave.

At most k others of a row are limited, looked for where its largest logits are: whichever they are, q is bound by less
then, and the loss stays below. Which, is found with c as it is before them; they take less than c p_v, so c grows, and
they are limited after it, too.

The gradient in the logits of the rest's columns is c p_v / p_rest, one number c a row, so that a pass over the
vocabulary is a sum and, with gradients, a product; all else is arithmetic on [rows, 2 k]. The parts' columns are taken
out of the logits before the sum, so that p_rest is a sum of what is in it and never 1 less almost 1. What the teacher's
tokens leave is known to LEAST at best, as its log-probabilities are rounded.

FLOPs and bytes as in `linear_student_loss`, and a pass for the likeliest.
"""

import math
from typing import NamedTuple

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
from distill_kernels.types import OBJECTIVES, Head

LEAST = 2.0**-20  # of probability
WIDTH = 64  # columns of a range in which one is looked for


class Parts(NamedTuple):
    """Both models' log-probabilities of r rows' parts, the rest last: [r, parts], -inf for what is no part."""

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
    for part, logits, grad in student_chunks(student, hidden, any(needed), workspace_bytes):
        ids, said = _named(top_ids[part], top_logprob[part].to(stats.dtype), V)
        x, slope = _tempered(logits, ids, head, temperature)
        own, _ = _tempered(logits, token_ids[part, None].clamp(0, V - 1), head, temperature)
        logits.scatter_(1, ids, -math.inf)
        others, exist = _likeliest(logits, ids, head.bias)
        y, other_slope = _tempered(logits, others, head, temperature)
        logits.scatter_(1, others, -math.inf)
        sums = implementation.rest_sums(logits, head, temperature)
        there = said > -math.inf
        x, y = x.masked_fill(~there, -math.inf), y.masked_fill(~exist, -math.inf)
        beyond, entropy = _of_rest(*sums, there.sum(1) + exist.sum(1), softcap, temperature)
        least, limited = _limited(y, beyond, said, there)
        rest = torch.logaddexp(beyond, y.masked_fill(limited, -math.inf).logsumexp(1))
        log_total = torch.logaddexp(torch.logaddexp(beyond, y.logsumexp(1)), x.logsumexp(1))
        said = torch.cat([said, least[:, None].where(limited, -math.inf)], 1)
        both = Parts(
            torch.cat([x, y.masked_fill(~limited, -math.inf), rest[:, None]], 1) - log_total[:, None],
            torch.cat([said, _left(said, rest)[:, None]], 1),
        )
        losses[part], of_parts, of_rest = _compared(both, OBJECTIVES[objective], beta)
        outside = (token_ids[part] < 0) | (token_ids[part] >= V)  # on CUDA, where nobody has looked
        logprob = stats[0, part].copy_((own[:, 0] - log_total).masked_fill(outside, math.nan))
        impossible = (logprob == -math.inf) & (stats[1, part] == -math.inf)
        stats[2, part] = (stats[1, part] - logprob).masked_fill_(impossible, 0)
        one_by_one = torch.cat([x, y, beyond[:, None]], 1) - log_total[:, None]
        p = one_by_one.exp()
        stats[4, part] = p[:, -1] * entropy - (p * one_by_one).masked_fill(p == 0, 0).sum(1)
        if grad is not None:
            k, of_rest = ids.shape[1], of_rest * mantissa[part]
            implementation.rest_gradient(logits, rest, of_rest, grad, head, temperature)
            named = of_parts[:, :k] * slope * mantissa[part, None]
            named = torch.where(there, named, named[:, :1])  # where a column stands in for what is not there
            shared = of_rest[:, None] * (y - rest[:, None].clamp(min=torch.finfo(y.dtype).min)).exp()
            other = torch.where(limited, of_parts[:, k:] * mantissa[part, None], shared) * other_slope
            grad.scatter_(1, others, torch.where(exist, other, 0).to(grad.dtype))
            grad.scatter_(1, ids, named.to(grad.dtype))
            write_gradients(student, grad, hidden, part, power[part], needed, gradients, token_ids, None)
        del logits, grad  # before the next chunk's
    return weighted_loss(losses, weights), *outputs[1:]


def _named(ids: Tensor, said: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Columns [r, k] that exist, and their log-probabilities: of those that do not, the first column and -inf."""
    there = (ids >= 0) & (ids < V) & (said > -math.inf)
    there[:, 0] = True  # one at least is named
    return torch.where(there, ids, ids[:, :1]).clamp(0, V - 1), said.masked_fill(~there, -math.inf)


def _likeliest(logits: Tensor, named: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns [r, at most k] of large logits among those that are not `named` [r, k], and whether each exists: the
    largest of the best ranges of columns, which takes one pass. One that does not exist is the first named one."""
    k, V = named.shape[1], logits.shape[1]
    width = max(1, min(WIDTH, V // (4 * k)))
    x = logits if bias is None else logits + bias
    peak, at = x[:, : V // width * width].view(len(x), -1, width).max(2)
    peak, best = peak.topk(min(k, peak.shape[1]), 1)
    exist = peak > -math.inf
    return torch.where(exist, best * width + at.gather(1, best), named[:, :1]), exist


def _limited(y: Tensor, beyond: Tensor, said: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The least log-probability [r] that the teacher said, and which of some others [r, k], tempered logits `y`, it
    limits: those whose share of what it left would be more."""
    least = said.masked_fill(~there, math.inf).amin(1)
    everything = torch.logaddexp(beyond, y.logsumexp(1))
    return least, y - everything[:, None] > (least - _left(said, everything))[:, None]


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


def _expected(p: Tensor, values: Tensor, is_part: Tensor) -> Tensor:
    return (p * values).masked_fill(~is_part | (p == 0), 0).sum(1)


@linear_top_loss.register_fake
def _(hidden, weight, bias, token_ids, token_weight, teacher_logprob, top_ids, top_logprob, needed, *_) -> Gradients:
    return new_outputs(hidden, weight, needed, accumulation_dtype(hidden, weight))


register_gradients(linear_top_loss, needed=8)
