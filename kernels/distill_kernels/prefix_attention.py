"""`prefix_attention`: exact attention over packed tokens in which completions share their prompt's keys, un-repeated.

A packed sequence is a run of causal segments without padding: prompts first, then completions, a prompt's next to
each other. A completion token attends causally to its own segment and to every token of its prompt. The two parts
are computed apart and merged by their log-sum-exps; the backward runs each part's ordinary flash backward with the
merged output and log-sum-exp, which is exact because a softmax's gradient needs nothing else (the identity behind
ring attention, arXiv 2310.01889). Left out on purpose: dropout, soft caps, sinks, windows shorter than a row.

Letters: L packed tokens, h query heads, g query heads per key-value head, d head size, n segments, w their width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_kernels.prefix_layout import PrefixLayout, Shared


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
    """[L, h, d], [L, h / g, d], [L, h / g, d] to the attention's output [L, h, d]; gradients to all three."""
    return _PrefixAttention.apply(query, key, value, layout, scale)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
        forward = _flash_forward if _has_flash(query, value) else _dense_forward
        out, lse = forward(query, key, value, layout, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out[: len(query)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        backward = _flash_backward if _has_flash(query, value) else _dense_backward
        return *backward(grad_out, query, key, value, out, lse, ctx.layout, ctx.scale), None, None


def _has_flash(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's variable-length flash kernels take these [L, h, d] tensors."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    head = query.shape[-1]
    return query.is_cuda and half and head == value.shape[-1] and head % 8 == 0 and head <= 256


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds a second set of keys to attention over a first, in place: out [M, h, d], lse [M, h] float32."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    out.copy_(torch.lerp(out.to(share.dtype), other_out.to(share.dtype), share))
    torch.logaddexp(lse, other_lse, out=lse)


# --- variable-length flash kernels (CUDA, half precision): one call for all segments, one for all prefixes ---


def _flash_arguments(layout: PrefixLayout) -> tuple[slice, slice, tuple, tuple]:
    """The sharing queries, the shared keys, and the length arguments of the causal and of the prefix call."""
    segment_ends, query_ends, key_ends = layout.offsets
    longest = max(layout.segments)
    causal = (segment_ends, segment_ends, longest, longest)
    longest_query = max((s.query_length for s in layout.shared), default=0)
    longest_key = max((s.key_length for s in layout.shared), default=0)
    prefix = (query_ends, key_ends, longest_query, longest_key)
    first = layout.shared[0] if layout.shared else Shared(0, 0, 0, 0)
    queries = slice(first.query_start, first.query_start + sum(s.query_length for s in layout.shared))
    keys = slice(first.key_start, first.key_start + sum(s.key_length for s in layout.shared))
    return queries, keys, causal, prefix


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [L, h, d] and its log-sum-exp [h, L] float32."""
    flash = torch.ops.aten._flash_attention_forward
    queries, keys, causal, prefix = _flash_arguments(layout)
    out, lse, *_ = flash(query, key, value, *causal, 0.0, True, False, scale=scale)
    if layout.shared:
        part = flash(query[queries], key[keys], value[keys], *prefix, 0.0, False, False, scale=scale)
        _merge(out[queries], lse[:, queries].t(), part[0], part[1].t())
    return out, lse


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    flash = torch.ops.aten._flash_attention_backward
    queries, keys, causal, prefix = _flash_arguments(layout)
    grad_out = grad_out.contiguous()
    random = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that is off
    unused = torch.empty(0, device=query.device)
    grads = flash(grad_out, query, key, value, out, lse, *causal, 0.0, True, random, unused, scale=scale)
    if layout.shared:
        shared = (query[queries], key[keys], value[keys], out[queries], lse[:, queries].contiguous())
        parts = flash(grad_out[queries], *shared, *prefix, 0.0, False, random, unused, scale=scale)
        for grad, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
            grad[where] += part
    return grads


# --- dense calls (CPU, and whatever the flash kernels do not take): one a bucket, one a shared prompt ---


def _dense_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [L + 1, h, d] and log-sum-exp [L + 1, h] float32 (float64 for float64); the last row takes padding."""
    L, h, _ = query.shape
    g = h // key.shape[1]
    out = query.new_empty(L + 1, h, value.shape[-1])
    lse = torch.empty(L + 1, h, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for bucket in layout.buckets:
        q, k, v = (bucket.take(each, bucket.read) for each in (query, key, value))
        part, part_lse = _attend(q, _repeat(k, g), _repeat(v, g), True, scale)
        bucket.put(out, part)
        bucket.put(lse, part_lse)
    # Padding's log-sum-exp: with it, a padded query has weight exp(-inf) = 0 in the backward.
    lse[L] = torch.inf
    for shared in layout.shared:
        queries, keys = _slices(shared)
        k, v = key[keys].transpose(0, 1)[None], value[keys].transpose(0, 1)[None]
        part, part_lse = _attend(_fold(query[queries], g), k, v, False, scale)
        _merge(out[queries], lse[queries], _unfold(part, g), _unfold(part_lse, g))
    return out, lse


def _dense_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    L = len(query)
    g = query.shape[1] // key.shape[1]
    grad_query, grad_key, grad_value = (each.new_empty(L + 1, *each.shape[1:]) for each in (query, key, value))
    for bucket in layout.buckets:
        q, k, v, o, go = (bucket.take(each, bucket.read) for each in (query, key, value, out, grad_out))
        stats = bucket.take(lse, bucket.write)
        parts = _attend_backward(go, q, _repeat(k, g), _repeat(v, g), o, stats, True, scale)
        bucket.put(grad_query, parts[0])
        bucket.put(grad_key, parts[1].unflatten(1, (-1, g)).sum(2) if g > 1 else parts[1])
        bucket.put(grad_value, parts[2].unflatten(1, (-1, g)).sum(2) if g > 1 else parts[2])
    for shared in layout.shared:
        queries, keys = _slices(shared)
        q, o, go, stats = (_fold(each[queries], g) for each in (query, out, grad_out, lse))
        k, v = key[keys].transpose(0, 1)[None], value[keys].transpose(0, 1)[None]
        parts = _attend_backward(go, q, k, v, o, stats, False, scale)
        grad_query[queries] += _unfold(parts[0], g)
        grad_key[keys] += parts[1][0].transpose(0, 1)
        grad_value[keys] += parts[2][0].transpose(0, 1)
    return grad_query[:L], grad_key[:L], grad_value[:L]


def _slices(shared: Shared) -> tuple[slice, slice]:
    queries = slice(shared.query_start, shared.query_start + shared.query_length)
    return queries, slice(shared.key_start, shared.key_start + shared.key_length)


def _repeat(heads: Tensor, g: int) -> Tensor:
    """[n, h / g, w, d] to [n, h, w, d]."""
    return heads if g == 1 else heads.repeat_interleave(g, dim=1)


def _fold(packed: Tensor, g: int) -> Tensor:
    """[M, h, ..] to [1, h / g, M g, ..]: without a mask, the heads of a group are more queries to the same keys."""
    return packed.unflatten(1, (-1, g)).transpose(0, 1).flatten(1, 2)[None]


def _unfold(folded: Tensor, g: int) -> Tensor:
    """The reverse of `_fold`."""
    return folded[0].unflatten(1, (-1, g)).transpose(0, 1).flatten(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [n, h, w, d] and its log-sum-exp [n, h, w]."""
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, causal, scale=scale)
    scores = _scores(query, key, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def _attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value of the part of a softmax, given its whole output and log-sum-exp."""
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(grad_out, query, key, value, out, lse, 0.0, causal, scale=scale)
    weight = (_scores(query, key, causal, scale) - lse[..., None]).exp()
    offset = (grad_out * out).sum(-1, keepdim=True, dtype=weight.dtype)
    grad_scores = (weight * ((grad_out @ value.mT).to(weight.dtype) - offset) * scale).to(query.dtype)
    return grad_scores @ key, grad_scores.mT @ query, weight.to(grad_out.dtype).mT @ grad_out


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """Scaled scores, float32 or better: [n, h, w, d], [n, h, w', d] -> [n, h, w, w']."""
    precision = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(precision) @ key.to(precision).mT) * scale
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    return scores
