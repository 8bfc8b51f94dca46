"""Row functions in PyTorch: what `triton_rows` does for CUDA, for tensors on a CPU.

A CPU is bound by memory, so the passes over the vocabulary run on a few rows at a time, whose buffers stay in the
cache: about 0.2 ns an element and pass on one core, against 0.6 ns from main memory. The logits buffers that come
in are scratch: they are overwritten.

Each softmax is kept as shifted logits s = z - max z (0 at the largest), so that differences of two models' logits
lose nothing to cancellation, whatever the size of the logits. Columns of logit -inf become `FLOOR`: exp gives 0
there, and 0 * FLOOR is 0 where 0 * -inf would be NaN.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distill_kernels.chunks import chunks
from distill_kernels.types import OBJECTIVES, Head

FLOOR = -1e30
_LOG2_E = 1 / math.log(2)
_SLICE_BYTES = 2 * 2**20  # of one of the five [rows, V] buffers that a slice works in


class Softmax(NamedTuple):
    """Of r rows: p = exps / total, log p = shifted - log_total."""

    shifted: Tensor  # [r, V]
    exps: Tensor  # [r, V]
    peak: Tensor  # [r, 1], the largest logit
    total: Tensor  # [r, 1]
    log_total: Tensor  # [r, 1]
    outside: Tensor | None  # [r, V] bool: columns of logit -inf, None where there is none


def token_stats(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    stats: Tensor,
    *,
    temperature: float,
    student_head: Head,
    teacher_head: Head,
) -> None:
    """Writes the six statistics [6, k] of k rows of raw logits [k, V], which it overwrites."""
    sums = stats.new_empty(len(RowSums._fields), len(student))
    for part, (exps_s, exps_t, difference) in row_slices(student):
        s = softmax_of(student[part], exps_s, student_head, temperature)
        t = softmax_of(teacher[part], exps_t, teacher_head, temperature)
        torch.stack(row_sums(s, t, difference), out=sums[:, part])
    write_stats(RowSums(*sums), at_tokens(student, token_ids), at_tokens(teacher, token_ids), stats)


def distill_rows(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    sampling_logprob: Tensor | None,
    stats: Tensor,
    losses: Tensor,
    row_scale: Tensor,
    grad: Tensor | None,
    *,
    advantage: Tensor | None,
    objective: int,
    importance_clip: float | None,
    beta: float,
    temperature: float,
    student_head: Head,
    teacher_head: Head,
    task_advantage: Tensor | None = None,
    token_weight: Tensor | None = None,
    lost: Tensor | None = None,
) -> None:
    """Statistics [6, k], losses [k] and the gradient of k rows of raw logits [k, V], which it overwrites.

    The gradient of row k's loss with respect to its tempered logits is row_scale[k] * grad[k]; the factor stays
    apart because the caller can apply it to H columns instead of V. `grad` may be `student` itself, or None.
    `token_weight` [k] goes into the factor. `lost` [k] becomes 0, as nothing is rounded here.
    """
    for part, (exps_s, exps_t, work) in row_slices(student):
        s = softmax_of(student[part], exps_s, student_head, temperature)
        t = softmax_of(teacher[part], exps_t, teacher_head, temperature)
        chosen = (at_tokens(model.shifted, token_ids[part]) for model in (s, t))
        write_stats(row_sums(s, t, work), *chosen, stats[:, part])
        # Before `student` is overwritten.
        slope = None if grad is None else softcap_slope(s, student_head, temperature)
        out = None if grad is None else grad[part]
        name = OBJECTIVES[objective]
        at_sampling = None if sampling_logprob is None else sampling_logprob[part]
        of_task = None if task_advantage is None else task_advantage[part].to(stats.dtype)
        if name == "sampled_reverse_kl":
            weight = stats[2, part] if advantage is None else advantage[part].to(stats.dtype)
            weight = weight if of_task is None else weight + of_task
            loss, factor = sampled_loss(stats[0, part], weight, at_sampling, importance_clip)
            if out is not None:
                sampled_gradient(s, token_ids[part], out)
        elif name == "reverse_kl":
            loss, factor = _reverse(s, t, stats[3, part], work, out)
        elif name == "forward_kl":
            loss, factor = _forward(s, t, work, out)
        else:
            loss, factor = _jsd(s, t, beta, work, out)
        if of_task is not None and name != "sampled_reverse_kl":
            more, credit = sampled_loss(stats[0, part], of_task, at_sampling, importance_clip)
            loss = loss + more
            factor, credit = (value.masked_fill(~loss.isfinite(), 0) for value in (factor, credit))
            if out is not None:
                factor = _with_sampled(out, factor, s, name == "jsd", token_ids[part], credit)
        if slope is not None:
            out.mul_(slope)
        losses[part], row_scale[part] = loss, factor
    if token_weight is not None:
        row_scale *= token_weight
    if lost is not None:
        lost.zero_()


def softmax_of(logits: Tensor, exps: Tensor, head: Head, temperature: float) -> Softmax:
    """Turns raw logits [r, V] into shifted ones in place, and their exponentials into `exps`."""
    return shifted_softmax(tempered(logits, head, temperature), logits, exps)


def tempered(logits: Tensor, head: Head, temperature: float) -> Tensor:
    """Turns raw logits [r, V] into tempered ones in place."""
    if head.bias is not None:
        logits += head.bias
    if head.scale != 1:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    if temperature != 1:
        logits /= temperature
    return logits


def softcap_slope(s: Softmax, head: Head, temperature: float) -> Tensor | None:
    """Of the head's softcap [r, V], None if it has none: 1 - tanh^2, with tanh = logit / softcap."""
    if head.softcap is None:
        return None
    return (s.shifted + s.peak).mul_(temperature / head.softcap).square_().neg_().add_(1)


def shifted_softmax(logits: Tensor, shifted: Tensor, exps: Tensor) -> Softmax:
    """Of logits [r, V] as they are; writes the buffers `shifted`, which may be `logits` itself, and `exps`."""
    peak = logits.amax(-1, keepdim=True).to(shifted.dtype)
    outside = shift(logits, peak, shifted)
    total = exponentials(shifted, exps).sum(-1, keepdim=True)
    return Softmax(shifted, exps, peak, total, total.log(), outside)


def shift(logits: Tensor, peak: Tensor, out: Tensor) -> Tensor | None:
    """out = logits - peak [r, 1], `FLOOR` where it is -inf; the mask of those columns, None where there is none."""
    torch.sub(logits, peak, out=out)
    if out.amin() > -math.inf:
        return None
    outside = out == -math.inf
    out.masked_fill_(outside, FLOOR)
    return outside


def exponentials(shifted: Tensor, out: Tensor) -> Tensor:
    """out = exp(shifted), up to 0, by way of powers of 2: on a CPU `torch.exp` takes four times as long.

    The product rounds: a relative error of |shifted| * 6e-8, which is large only where exp is next to nothing.
    """
    return torch.mul(shifted, _LOG2_E, out=out).exp2_()


def _mean(weights: Tensor, total: Tensor, values: Tensor) -> Tensor:
    """[r, 1]: sum of weights * values / total."""
    return torch.linalg.vecdot(weights, values)[:, None] / total


def at_tokens(shifted: Tensor, token_ids: Tensor) -> Tensor:
    """[r] shifted logits of the tokens, -inf instead of `FLOOR`."""
    chosen = shifted.gather(1, token_ids[:, None])[:, 0]
    return chosen.masked_fill(chosen < FLOOR / 2, -math.inf)


def _missed(p: Softmax, q: Softmax) -> Tensor | None:
    """[r, 1] bool: q is zero somewhere in p's support; None where q is zero nowhere."""
    if q.outside is None:
        return None
    missed = q.outside if p.outside is None else q.outside & ~p.outside
    return missed.any(-1, keepdim=True)


class RowSums(NamedTuple):
    """Of r rows, [r] each: what the statistics need of the vocabulary."""

    total_s: Tensor  # sum of e_s, the student's exponentials
    total_t: Tensor  # sum of e_t
    cross: Tensor  # sum of e_s (s - t), shifted logits; inf where the teacher excludes what the student does not
    own_s: Tensor  # sum of e_s s
    own_t: Tensor  # sum of e_t t


def row_sums(s: Softmax, t: Softmax, difference: Tensor) -> RowSums:
    """`difference` [r, V] becomes s - t, of shifted logits."""
    torch.sub(s.shifted, t.shifted, out=difference)
    cross = torch.linalg.vecdot(s.exps, difference)
    missed = _missed(s, t)
    if missed is not None:
        cross.masked_fill_(missed[:, 0], math.inf)
    own = [torch.linalg.vecdot(model.exps, model.shifted) for model in (s, t)]
    return RowSums(s.total[:, 0], t.total[:, 0], cross, *own)


def write_stats(sums: RowSums, token_s: Tensor, token_t: Tensor, stats: Tensor) -> None:
    """Writes the six statistics [6, r]; `token_s` and `token_t` [r] are the shifted logits of the tokens.

    Of many rows at once where that can be: some thirty operations on [r] take as long for ten rows as for a thousand.
    """
    log_total_s, log_total_t = sums.total_s.log(), sums.total_t.log()
    torch.sub(token_s, log_total_s, out=stats[0])
    torch.sub(token_t, log_total_t, out=stats[1])
    impossible = (stats[0] == -math.inf) & (stats[1] == -math.inf)
    stats[2] = (stats[1] - stats[0]).masked_fill_(impossible, 0)
    stats[3] = sums.cross / sums.total_s - log_total_s + log_total_t
    stats[4] = log_total_s - sums.own_s / sums.total_s
    stats[5] = log_total_t - sums.own_t / sums.total_t


def sampled_loss(
    logprob: Tensor, advantage: Tensor, sampling_logprob: Tensor | None, importance_clip: float | None
) -> tuple[Tensor, Tensor]:
    """loss = -rho A log p(y), and rho A, the factor of its gradient p - onehot; [r] each."""
    ratio = torch.ones_like(logprob)
    if sampling_logprob is not None:
        ratio = (logprob - sampling_logprob).exp()
        if importance_clip is not None:
            ratio = ratio.clamp(max=importance_clip)
    advantage = (ratio * advantage).masked_fill(ratio == 0, 0)
    loss = (-advantage * logprob).masked_fill((advantage == 0) | (logprob == 0), 0)
    return loss, advantage.masked_fill(~loss.isfinite(), 0)


def sampled_gradient(s: Softmax, token_ids: Tensor, out: Tensor) -> Tensor:
    """out [r, V] = p - onehot, which may be where the softmax keeps its exponentials."""
    torch.div(s.exps, s.total, out=out)
    return out.scatter_add_(1, token_ids[:, None], torch.full_like(s.total, -1))


def _reverse(s: Softmax, t: Softmax, kl: Tensor, difference: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """loss = KL(student || teacher), already known; gradient p (log p - log q - KL). `difference` is s - t, shifted."""
    if out is not None:
        mean = _mean(s.exps, s.total, difference)
        torch.mul(difference.sub_(mean), s.exps, out=out)
    return kl, s.total[:, 0].reciprocal().masked_fill(kl == math.inf, 0)


def _forward(s: Softmax, t: Softmax, difference: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """loss = KL(teacher || student); gradient p - q. `difference` is s - t, shifted."""
    loss = s.log_total - t.log_total - _mean(t.exps, t.total, difference)
    missed = _missed(t, s)
    if missed is not None:
        loss = loss.masked_fill(missed, math.inf)
    if out is not None:
        torch.addcmul(s.exps, t.exps, -s.total / t.total, out=out)
    return loss[:, 0], s.total[:, 0].reciprocal().masked_fill(loss[:, 0] == math.inf, 0)


def _jsd(s: Softmax, t: Softmax, beta: float, work: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """loss = beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; gradient
    (1 - beta) p (log p / m - KL(p || m))."""
    p, q = s.exps.div_(s.total), t.exps.div_(t.total)
    # Both p and q round to 0 where m does: the clamp keeps 0 * log 0 at 0.
    log_mixture = torch.mul(p, 1 - beta, out=work).add_(q, alpha=beta).clamp_(min=torch.finfo(p.dtype).tiny).log_()
    of_teacher = torch.linalg.vecdot(q, t.shifted.sub_(t.log_total).sub_(log_mixture))
    ratio = s.shifted.sub_(s.log_total).sub_(log_mixture)
    of_student = torch.linalg.vecdot(p, ratio)
    if out is not None:
        torch.mul(ratio.sub_(of_student[:, None]), p, out=out)
    return beta * of_teacher + (1 - beta) * of_student, torch.full_like(of_student, 1 - beta)


def _with_sampled(
    out: Tensor, factor: Tensor, s: Softmax, normalised: bool, token_ids: Tensor, credit: Tensor
) -> Tensor:
    """out [r, V] becomes factor out + credit (p - onehot), whose factor [r] is then 1; `normalised` if s.exps is p."""
    share = credit[:, None] if normalised else credit[:, None] / s.total
    out.mul_(factor[:, None]).addcmul_(s.exps, share).scatter_add_(1, token_ids[:, None], -credit[:, None])
    return torch.ones_like(factor)


def row_slices(rows: Tensor, dtype: torch.dtype | None = None, buffers: int = 3) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows [k, V] whose `buffers` [r, V] (of `dtype`, if given) stay in the cache."""
    (k, V), dtype = rows.shape, dtype or rows.dtype
    height = min(cached_rows(V, dtype), k)
    space = torch.empty(buffers, height, V, dtype=dtype)
    for part in chunks(k, max(1, height)):
        yield part, space[:, : part.stop - part.start]


def cached_rows(V: int, dtype: torch.dtype) -> int:
    """How many rows of V columns a slice takes for its buffers to stay in the cache."""
    return max(1, _SLICE_BYTES // (V * dtype.itemsize))
