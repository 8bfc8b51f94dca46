"""Packed attention with shared prompts in PyTorch: for CPUs, and whatever the Triton kernels do not take.

Segments of like length are one dense call, and so is each shared prompt with all its completions; the two parts are
merged by their log-sum-exps. The backward runs each part's ordinary backward with the merged output and log-sum-exp,
which is exact because a softmax's gradient needs nothing else (the identity behind ring attention, arXiv 2310.01889).
A sink is one more key, with a value of zero, and merges likewise. Keys are never repeated for the query heads that
share them: PyTorch's flash kernel for CPUs takes them as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill_kernels.prefix_layout import Bucket, PrefixLayout


def statistics_shape(L: int, h: int) -> tuple[int, int]:
    """Of the log-sum-exps that `forward` keeps for `backward`: the last row is padding's."""
    return L + 1, h


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layout: PrefixLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Output [L, h, dv] and log-sum-exp [L + 1, h] float32 (float64 for float64); see `prefix_attention`."""
    L = len(query)
    out, lse = _forward(query, key, value, layout, _Options(scale, window, softcap))
    if sinks is not None:
        _merge_sinks(out[:L], lse[:L], sinks)
    return out[:L], lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients to query, key, value and sinks, from what `forward` gave."""
    options = _Options(scale, window, softcap)
    grads = _backward(grad_out, query, key, value, out, lse, layout, options)
    if sinks is None:
        return *grads, None
    share = (sinks - lse[: len(query)]).exp()
    return *grads, -(share * (grad_out * out).sum(-1, dtype=share.dtype)).sum(0).to(sinks.dtype)


def _merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Adds a key of logit `sinks` [h] and of value 0, in place: out [L, h, d], lse [L, h] float32."""
    out.copy_(out * torch.sigmoid(lse - sinks.to(lse.dtype))[..., None])
    torch.logaddexp(lse, sinks.to(lse.dtype), out=lse)


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds a second set of keys to attention over a first, in place: out [M, h, d], lse [M, h] float32 or better."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    out.copy_(torch.lerp(out.to(share.dtype), other_out.to(share.dtype), share))
    torch.logaddexp(lse, other_lse, out=lse)


class _Options(NamedTuple):
    scale: float
    window: int | None
    softcap: float | None


class _Scores(NamedTuple):
    """How a dense call scores: causally or not; a key may have to be `seen` [w, w'] bool, too."""

    scale: float
    softcap: float | None
    causal: bool
    seen: Tensor | None = None

    @classmethod
    def within(cls, bucket: Bucket, options: _Options, device: torch.device) -> "_Scores":
        """A segment's tokens on one another."""
        seen = None
        if options.window is not None and options.window < bucket.width:
            seen = torch.ones(bucket.width, bucket.width, dtype=torch.bool, device=device).triu(1 - options.window)
        return cls(options.scale, options.softcap, True, seen)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, options: _Options
) -> tuple[Tensor, Tensor]:
    """Output [L + 1, h, dv] and log-sum-exp [L + 1, h] float32 (float64 for float64); the last row takes padding."""
    L, h, _ = query.shape
    out = query.new_empty(L + 1, h, value.shape[-1])
    lse = torch.empty(L + 1, h, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for bucket in layout.buckets:
        q, k, v = (bucket.take(each, bucket.read) for each in (query, key, value))
        part, part_lse = _attend(q, k, v, _Scores.within(bucket, options, q.device))
        bucket.put(out, part)
        bucket.put(lse, part_lse)
    # Padding's log-sum-exp: with it, a padded query has weight exp(-inf) = 0 in the backward.
    lse[L] = torch.inf
    for prefix in layout.prefixes(options.window):
        k, v = (_dense(each[prefix.keys]) for each in (key, value))
        q, whole, whole_lse = (each[prefix.queries] for each in (query, out, lse))
        part, part_lse = _attend(_dense(q), k, v, _Scores(options.scale, options.softcap, False, prefix.seen))
        _merge(whole, whole_lse, part[0].transpose(0, 1), part_lse[0].transpose(0, 1))
        if isinstance(prefix.queries, Tensor):  # else `whole` is a view
            out[prefix.queries], lse[prefix.queries] = whole, whole_lse
    return out, lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor]:
    L = len(query)
    grads = tuple(each.new_empty(L + 1, *each.shape[1:]) for each in (query, key, value))
    for bucket in layout.buckets:
        q, k, v, o, go = (bucket.take(each, bucket.read) for each in (query, key, value, out, grad_out))
        stats = bucket.take(lse, bucket.write)
        scores = _Scores.within(bucket, options, q.device)
        for grad, part in zip(grads, _attend_backward(go, q, k, v, o, stats, scores), strict=True):
            bucket.put(grad, part)
    for prefix in layout.prefixes(options.window):
        q, o, go, stats = (_dense(each[prefix.queries]) for each in (query, out, grad_out, lse))
        k, v = (_dense(each[prefix.keys]) for each in (key, value))
        scores = _Scores(options.scale, options.softcap, False, prefix.seen)
        parts = _attend_backward(go, q, k, v, o, stats, scores)
        for grad, part, rows in zip(grads, parts, (prefix.queries, prefix.keys, prefix.keys), strict=True):
            grad[rows] += part[0].transpose(0, 1)
    return tuple(grad[:L] for grad in grads)


def _dense(packed: Tensor) -> Tensor:
    """[M, h, ..] to [1, h, M, ..]."""
    return packed.transpose(0, 1)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: _Scores) -> tuple[Tensor, Tensor]:
    """Attention [n, h, w, dv] and its log-sum-exp [n, h, w]; keys and values [n, h / g, w', ..]."""
    if _has_cpu_flash(query, scores):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # Its heads are of one size: zeros add nothing, and are faster than products of whole scores.
        q, k, v = _padded(query, key, value)
        out, lse = flash(q, k, v, 0.0, scores.causal, attn_mask=_bias(q, scores), scale=scores.scale)
        return _cut(out, value), lse
    capped, _ = _scored(query, key, scores)
    lse = capped.logsumexp(-1)
    return _product((capped - lse[..., None]).exp().to(value.dtype), value), lse


def _attend_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scores: _Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value of the part of a softmax, given its whole output and log-sum-exp."""
    if _has_cpu_flash(query, scores):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        tensors = _padded(grad_out, query, key, value, out)
        bias = _bias(query, scores)
        grads = flash(*tensors, lse, 0.0, scores.causal, attn_mask=bias, scale=scores.scale)
        return tuple(_cut(grad, like) for grad, like in zip(grads, (query, key, value), strict=True))
    capped, slope = _scored(query, key, scores)
    weight = (capped - lse[..., None]).exp()
    offset = (grad_out * out).sum(-1, keepdim=True, dtype=weight.dtype)
    grad_scores = (weight * (_product(grad_out, value.mT).to(weight.dtype) - offset) * slope).to(query.dtype)
    of_keys = grad_scores.mT @ query, weight.to(grad_out.dtype).mT @ grad_out
    return _product(grad_scores, key), *(each.unflatten(1, (key.shape[1], -1)).sum(2) for each in of_keys)


def _product(rows: Tensor, of_keys: Tensor) -> Tensor:
    """[n, h, w, x] times [n, h / g, x, y]: [n, h, w, y]."""
    return (rows.unflatten(1, (of_keys.shape[1], -1)) @ of_keys[:, :, None]).flatten(1, 2)


def _has_cpu_flash(query: Tensor, scores: _Scores) -> bool:
    return query.device.type == "cpu" and scores.softcap is None


def _cut(padded: Tensor, like: Tensor) -> Tensor:
    """Without `_padded`'s zeros."""
    return padded if padded.shape[-1] == like.shape[-1] else padded[..., : like.shape[-1]]


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With zeros, to the largest of their last dimensions."""
    widest = max(each.shape[-1] for each in tensors)
    return tuple(
        each if each.shape[-1] == widest else nn.functional.pad(each, (0, widest - each.shape[-1])) for each in tensors
    )


def _bias(query: Tensor, scores: _Scores) -> Tensor | None:
    """What keeps the flash call for CPUs from unseen keys, in the query's dtype: [n, h, w, w']."""
    if scores.seen is None:
        return None
    bias = torch.zeros(scores.seen.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~scores.seen, -torch.inf).expand(*query.shape[:2], -1, -1)


def _scored(query: Tensor, key: Tensor, scores: _Scores) -> tuple[Tensor, Tensor | float]:
    """Scores [n, h, w, w'] in float32 or better, -inf where a key is not seen, and their slope by the products."""
    precision = torch.promote_types(query.dtype, torch.float32)
    found, slope = _product(query.to(precision), key.to(precision).mT) * scores.scale, scores.scale
    if scores.softcap is not None:
        share = torch.tanh(found / scores.softcap)
        found, slope = scores.softcap * share, scores.scale * (1 - share * share)
    if scores.causal:
        above = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
        found = found.masked_fill(above, -torch.inf)
    if scores.seen is not None:
        found = found.masked_fill(~scores.seen, -torch.inf)
    return found, slope
