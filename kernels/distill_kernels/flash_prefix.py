"""`prefix_attention` by variable-length flash kernels (CUDA, half precision): a call for all segments, one for all
prefixes, and their merge.

A flash backward has programs by keys and heads alone, so that one prompt with thousands of queries would leave most of
a card idle. There the queries are cut up, each piece with a copy of the prompt's keys (`PrefixLayout.cut`), and what
the copies got is added up. Left out on purpose: sinks, which `prefix_attention` merges after either way.
"""

import torch
from torch import Tensor

from distill_kernels import backend
from distill_kernels.prefix_layout import Cut, PrefixLayout, Shared

# Not a `custom_op`, which takes as long on the host as the launch does: every layer of every pass merges once.
MERGE = "distill_kernels::merge_attention"
torch.library.define(MERGE, "(Tensor(a!) out, Tensor(b!) lse, Tensor other_out, Tensor other_lse) -> ()")


@torch.library.impl(MERGE, "CompositeExplicitAutograd")
def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    backend.implementation("merge", out.device).merge(out, lse, other_out, other_lse)


@torch.library.register_fake(MERGE)
def _(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    pass


def merge_attention(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds a second set of keys to attention over a first, in place: out [M, h, d], lse [M, h] float32.

    The last stride of `out` and `other_out` must be 1, the others are free. No gradients.
    """
    torch.ops.distill_kernels.merge_attention(out, lse, other_out, other_lse)


def _spans(layout: PrefixLayout) -> tuple[slice, slice]:
    """The sharing queries and the shared keys: prompts lie next to each other, and so do their completions."""
    first = layout.shared[0] if layout.shared else Shared(0, 0, 0, 0)
    queries = slice(first.query_start, first.query_start + sum(s.query_length for s in layout.shared))
    keys = slice(first.key_start, first.key_start + sum(s.key_length for s in layout.shared))
    return queries, keys


def _lengths(layout: PrefixLayout) -> tuple[tuple, tuple]:
    """The length arguments of the causal and of the prefix call."""
    segment_ends, query_ends, key_ends = layout.offsets
    longest = max(layout.segments)
    longest_query = max((s.query_length for s in layout.shared), default=0)
    longest_key = max((s.key_length for s in layout.shared), default=0)
    return (segment_ends, segment_ends, longest, longest), (query_ends, key_ends, longest_query, longest_key)


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [L, h, d] and its log-sum-exp [h, L] float32."""
    flash = torch.ops.aten._flash_attention_forward
    (queries, keys), (causal, prefix) = _spans(layout), _lengths(layout)
    out, lse, *_ = flash(query, key, value, *causal, 0.0, True, False, scale=scale)
    if layout.shared:
        part = flash(query[queries], key[keys], value[keys], *prefix, 0.0, False, False, scale=scale)
        merge_attention(out[queries], lse[:, queries].t(), part[0], part[1].t())
    return out, lse


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, from the merged output and log-sum-exp."""
    flash = torch.ops.aten._flash_attention_backward
    (queries, keys), (causal, prefix) = _spans(layout), _lengths(layout)
    grad_out = grad_out.contiguous()
    random = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that is off
    unused = torch.empty(0, device=query.device)
    grads = flash(grad_out, query, key, value, out, lse, *causal, 0.0, True, random, unused, scale=scale)
    if layout.shared:
        cut = layout.cut(query.shape[1])
        if cut is None:
            of_prompts = key[keys], value[keys]
        else:
            of_prompts, prefix = (each.index_select(0, cut.keys) for each in (key, value)), cut.lengths
        shared = (query[queries], *of_prompts, out[queries], lse[:, queries].contiguous())
        parts = flash(grad_out[queries], *shared, *prefix, 0.0, False, random, unused, scale=scale)
        grads[0][queries].add_(parts[0])
        for grad, part in zip(grads[1:], parts[1:], strict=True):
            if cut is None:
                grad[keys].add_(part)
            else:
                _add_copies(grad, part, layout.shared, cut)
    return grads


def _add_copies(grad: Tensor, part: Tensor, shared: list[Shared], cut: Cut) -> None:
    """Adds to prompts' keys what each of their copies got: in float32, rounded once."""
    at, wide = 0, torch.promote_types(part.dtype, torch.float32)
    for prompt, pieces in zip(shared, cut.pieces, strict=True):
        copies = part[at : at + pieces * prompt.key_length].unflatten(0, (pieces, prompt.key_length))
        grad[prompt.key_start : prompt.key_start + prompt.key_length].add_(copies.sum(0, dtype=wide))
        at += pieces * prompt.key_length
