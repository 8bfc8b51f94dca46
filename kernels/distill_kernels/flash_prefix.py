"""`prefix_attention` by variable-length flash kernels (CUDA, half precision): a call for all segments, one for all
prefixes, and their merge.

Left out on purpose: sinks, which `prefix_attention` merges after either way.
"""

import torch
from torch import Tensor

from distill_kernels import backend
from distill_kernels.prefix_layout import PrefixLayout, Shared


@torch.library.custom_op("distill_kernels::merge_attention", mutates_args=("out", "lse"))
def merge_attention(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds a second set of keys to attention over a first, in place: out [M, h, d], lse [M, h] float32.

    The last stride of `out` and `other_out` must be 1, the others are free. No gradients.
    """
    backend.implementation("merge", out.device).merge(out, lse, other_out, other_lse)


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
        shared = (query[queries], key[keys], value[keys], out[queries], lse[:, queries].contiguous())
        parts = flash(grad_out[queries], *shared, *prefix, 0.0, False, random, unused, scale=scale)
        for grad, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
            grad[where] += part
    return grads
