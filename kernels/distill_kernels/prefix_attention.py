"""`prefix_attention`: exact attention over packed tokens in which completions share their prompt's keys, un-repeated.

A packed sequence is a run of causal segments without padding: prompts first, then completions, a prompt's next to
each other. A completion token attends causally to its own segment and to its prompt, both through a window if there is
one. The two parts are computed apart and merged by their log-sum-exps; the backward runs each part's ordinary flash
backward with the merged output and log-sum-exp, which is exact because a softmax's gradient needs nothing else (the
identity behind ring attention, arXiv 2310.01889). A sink is one more key, with a value of zero, and merges likewise.
On CUDA that runs in flash_prefix.py; here is the dense way, for CPUs and what those kernels do not take.
Left out on purpose: dropout; flash kernels on CUDA for windows and soft caps, which take the dense way there.

Letters: L packed tokens, h query heads, g query heads per key-value head, d head size (dv that of values), n segments,
w their width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distill_kernels.flash_prefix import flash_backward, flash_forward
from distill_kernels.prefix_layout import Bucket, Prefix, PrefixLayout, layout_of
from distill_kernels.twin_merge import merge


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout | Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[L, h, d], [L, h / g, d], [L, h / g, dv] to the attention's output [L, h, dv]; gradients to all, and to `sinks`.

    A token sees itself and the `window` - 1 tokens before it, its prompt's counted. `softcap` bounds the scaled scores:
    softcap * tanh(score / softcap). `sinks` [h] are logits that take part in the softmax, and nothing of the output.
    A layout's handle stands for it where `torch.compile` traces, to which the whole is one operation then.
    """
    return _PrefixAttention.apply(query, key, value, sinks, layout, _Options(scale, window, softcap))


class _Options(NamedTuple):
    """What a call is given beside tensors and their layout."""

    scale: float
    window: int | None
    softcap: float | None


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        layout: PrefixLayout | Tensor,
        options: _Options,
    ) -> Tensor:
        if isinstance(layout, Tensor):
            out, lse = torch.ops.distill_kernels.prefix_attention(query, key, value, layout, *options)
        else:
            out, lse = _forward(query, key, value, layout, options)
        if sinks is not None:
            _merge_sinks(out, _by_token(lse, query, value, options), sinks)
        ctx.layout, ctx.options = layout, options
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        tensors = (grad_out, query, key, value, out, lse)
        if isinstance(ctx.layout, Tensor):
            grads = torch.ops.distill_kernels.prefix_attention_backward(*tensors, ctx.layout, *ctx.options)
        else:
            grads = _backward(*tensors, ctx.layout, ctx.options)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            share = (sinks - _by_token(lse, query, value, ctx.options)).exp()
            grad_sinks = -(share * (grad_out * out).sum(-1, dtype=share.dtype)).sum(0).to(sinks.dtype)
        return *grads, grad_sinks, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, options: _Options
) -> tuple[Tensor, Tensor]:
    """Output [L, h, dv] and log-sum-exp: [h, L] of flash kernels, else [L + 1, h], whose last row is padding's."""
    layout.calls += 1
    layout.windowed_calls += options.window is not None
    if _has_flash(query, value, options):
        return flash_forward(query, key, value, layout, options.scale)
    out, lse = _dense_forward(query, key, value, layout, options)
    return out[: len(query)], lse


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
    """Gradients to query, key and value, from what `_forward` gave."""
    tensors = (grad_out, query, key, value, out, lse)
    if _has_flash(query, value, options):
        return flash_backward(*tensors, layout, options.scale)
    return _dense_backward(*tensors, layout, options)


def _has_flash(query: Tensor, value: Tensor, options: _Options) -> bool:
    """Whether PyTorch's variable-length flash kernels take these [L, h, d] tensors."""
    if options.window is not None or options.softcap is not None:
        return False
    half = query.dtype in (torch.float16, torch.bfloat16)
    head = query.shape[-1]
    return query.is_cuda and half and head == value.shape[-1] and head % 8 == 0 and head <= 256


def _by_token(lse: Tensor, query: Tensor, value: Tensor, options: _Options) -> Tensor:
    """`_forward`'s log-sum-exp as [L, h]."""
    return lse.t() if _has_flash(query, value, options) else lse[: len(query)]


def _merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Adds a key of logit `sinks` [h] and of value 0, in place: out [L, h, d], lse [L, h] float32."""
    out.copy_(out * torch.sigmoid(lse - sinks.to(lse.dtype))[..., None])
    lse.copy_(torch.logaddexp(lse, sinks.to(lse.dtype)))  # a compiler takes no transposed `out`


# --- the same two as ops, which a compiler does not look into: a layout's handle [1] in place of the layout ---

FORWARD, BACKWARD = "distill_kernels::prefix_attention", "distill_kernels::prefix_attention_backward"
OPTIONS = "Tensor layout, float scale, SymInt? window, float? softcap"
STRIDES = torch.Tag.needs_exact_strides  # those of the results follow from them
torch.library.define(
    FORWARD, f"(Tensor query, Tensor key, Tensor value, {OPTIONS}) -> (Tensor, Tensor)", tags=(STRIDES,)
)
torch.library.define(
    BACKWARD,
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor)",
    tags=(STRIDES,),
)


@torch.library.impl(FORWARD, "CompositeExplicitAutograd")
def _(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, *options: float | None) -> tuple[Tensor, Tensor]:
    return _forward(query, key, value, layout_of(layout), _Options(*options))


@torch.library.impl(BACKWARD, "CompositeExplicitAutograd")
def _(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(*arguments[:6], layout_of(arguments[6]), _Options(*arguments[7:]))


@torch.library.register_fake(FORWARD)
def _(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, *options: float | None) -> tuple[Tensor, Tensor]:
    L, h, _ = query.shape
    precision = torch.promote_types(query.dtype, torch.float32)
    if _has_flash(query, value, _Options(*options)):
        return torch.empty_like(query), query.new_empty(h, L, dtype=precision)
    return query.new_empty(L, h, value.shape[-1]), query.new_empty(L + 1, h, dtype=precision)


@torch.library.register_fake(BACKWARD)
def _(grad_out: Tensor, *arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = arguments[:3]
    if _has_flash(query, value, _Options(*arguments[6:])):  # whose kernels lay gradients out as what they are of
        return tuple(torch.empty_like(each) for each in (query, key, value))
    return tuple(each.new_empty(each.shape) for each in (query, key, value))


# --- dense calls (CPU, and whatever the flash kernels do not take): one a bucket, one a shared prompt ---


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


def _dense_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, options: _Options
) -> tuple[Tensor, Tensor]:
    """Output [L + 1, h, dv] and log-sum-exp [L + 1, h] float32 (float64 for float64); the last row takes padding."""
    L, h, _ = query.shape
    g = h // key.shape[1]
    out = query.new_empty(L + 1, h, value.shape[-1])
    lse = torch.empty(L + 1, h, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for bucket in layout.buckets:
        q, k, v = (bucket.take(each, bucket.read) for each in (query, key, value))
        part, part_lse = _attend(q, _repeat(k, g), _repeat(v, g), _Scores.within(bucket, options, q.device))
        bucket.put(out, part)
        bucket.put(lse, part_lse)
    # Padding's log-sum-exp: with it, a padded query has weight exp(-inf) = 0 in the backward.
    lse[L] = torch.inf
    for prefix in layout.prefixes(options.window):
        k, v = (each[prefix.keys].transpose(0, 1)[None] for each in (key, value))
        q, whole, whole_lse = (each[prefix.queries] for each in (query, out, lse))
        part, part_lse = _attend(_fold(q, g), k, v, _Scores(options.scale, options.softcap, False, _of(prefix, g)))
        merge(whole, whole_lse, _unfold(part, g), _unfold(part_lse, g))
        if isinstance(prefix.queries, Tensor):  # else `whole` is a view
            out[prefix.queries], lse[prefix.queries] = whole, whole_lse
    return out, lse


def _dense_backward(
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
    g = query.shape[1] // key.shape[1]
    grad_query, grad_key, grad_value = (each.new_empty(L + 1, *each.shape[1:]) for each in (query, key, value))
    for bucket in layout.buckets:
        q, k, v, o, go = (bucket.take(each, bucket.read) for each in (query, key, value, out, grad_out))
        stats = bucket.take(lse, bucket.write)
        scores = _Scores.within(bucket, options, q.device)
        parts = _attend_backward(go, q, _repeat(k, g), _repeat(v, g), o, stats, scores)
        bucket.put(grad_query, parts[0])
        bucket.put(grad_key, parts[1].unflatten(1, (-1, g)).sum(2) if g > 1 else parts[1])
        bucket.put(grad_value, parts[2].unflatten(1, (-1, g)).sum(2) if g > 1 else parts[2])
    for prefix in layout.prefixes(options.window):
        q, o, go, stats = (_fold(each[prefix.queries], g) for each in (query, out, grad_out, lse))
        k, v = (each[prefix.keys].transpose(0, 1)[None] for each in (key, value))
        scores = _Scores(options.scale, options.softcap, False, _of(prefix, g))
        parts = _attend_backward(go, q, k, v, o, stats, scores)
        grad_query[prefix.queries] += _unfold(parts[0], g)
        grad_key[prefix.keys] += parts[1][0].transpose(0, 1)
        grad_value[prefix.keys] += parts[2][0].transpose(0, 1)
    return grad_query[:L], grad_key[:L], grad_value[:L]


def _repeat(heads: Tensor, g: int) -> Tensor:
    """[n, h / g, w, d] to [n, h, w, d]."""
    return heads if g == 1 else heads.repeat_interleave(g, dim=1)


def _fold(packed: Tensor, g: int) -> Tensor:
    """[M, h, ..] to [1, h / g, M g, ..]: the heads of a group are more queries to the same keys."""
    return packed.unflatten(1, (-1, g)).transpose(0, 1).flatten(1, 2)[None]


def _unfold(folded: Tensor, g: int) -> Tensor:
    """The reverse of `_fold`."""
    return folded[0].unflatten(1, (-1, g)).transpose(0, 1).flatten(1, 2)


def _of(prefix: Prefix, g: int) -> Tensor | None:
    """What each of the folded queries of a prefix sees."""
    return prefix.seen if prefix.seen is None or g == 1 else prefix.seen.repeat_interleave(g, dim=0)


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: _Scores) -> tuple[Tensor, Tensor]:
    """Attention [n, h, w, dv] and its log-sum-exp [n, h, w]."""
    if _has_cpu_flash(query, scores):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # Its heads are of one size: zeros add nothing, and are faster than products of whole scores.
        q, k, v = _padded(query, key, value)
        out, lse = flash(q, k, v, 0.0, scores.causal, attn_mask=_bias(q, scores), scale=scores.scale)
        return _cut(out, value), lse
    capped, _ = _scored(query, key, scores)
    lse = capped.logsumexp(-1)
    return (capped - lse[..., None]).exp().to(value.dtype) @ value, lse


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
    grad_scores = (weight * ((grad_out @ value.mT).to(weight.dtype) - offset) * slope).to(query.dtype)
    return grad_scores @ key, grad_scores.mT @ query, weight.to(grad_out.dtype).mT @ grad_out


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
    found, slope = (query.to(precision) @ key.to(precision).mT) * scores.scale, scores.scale
    if scores.softcap is not None:
        share = torch.tanh(found / scores.softcap)
        found, slope = scores.softcap * share, scores.scale * (1 - share * share)
    if scores.causal:
        above = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
        found = found.masked_fill(above, -torch.inf)
    if scores.seen is not None:
        found = found.masked_fill(~scores.seen, -torch.inf)
    return found, slope
