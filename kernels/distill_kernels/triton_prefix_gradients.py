"""The backward of packed attention in Triton: the query kernel, the key kernel, and the sum of a prompt's parts.

The query kernel goes over keys as the forward does. The key kernel has a program for a block of keys and a key-value
head, which goes over the queries that see them. Those of a prompt are cut into parts, each written to float32 of its
own; the sum kernel adds the parts in their order, so that the same tensors give the same gradient to the last bit.
"""

import triton
import triton.language as tl

from distill_kernels.triton_heads import load_rows, store_rows, tanh
from distill_kernels.triton_math import offset_of
from distill_kernels.triton_prefix_blocks import line_of, seen_by, seen_keys


@triton.jit
def _weights(scores, lse_log2, scale_log2, cap_log2, CAP: tl.constexpr):
    """Scores as products to their share of the softmax, and their slope by the products, without the scale."""
    if CAP:
        share = tanh(scores * scale_log2)
        return tl.exp2(share * cap_log2 - lse_log2), 1 - share * share
    return tl.exp2(scores * scale_log2 - lse_log2), tl.full(scores.shape, 1.0, tl.float32)


@triton.jit
def _to_query(
    query, grad, keys, values, key_row, value_row, first, end, place, window, lse_log2, delta, acc, scale_log2,
    cap_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the keys at positions first..end add to the gradient of a tile's queries."""
    for start in tl.range(first, end, N, num_stages=STAGES):
        n = start + tl.arange(0, N)
        k = load_rows(keys, n, key_row, n < end, D, BLOCK_D)
        v = load_rows(values, n, value_row, n < end, DV, BLOCK_DV)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        weights, slope = _weights(scores, lse_log2[:, None], scale_log2, cap_log2, CAP)
        weights = tl.where(seen_by(place, n, end, window, WINDOW), weights, 0.0)
        to_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        to_scores = (weights * (to_weights - delta[:, None]) * slope).to(k.dtype)
        acc = tl.dot(to_scores, k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["L", "window"])
def query_kernel(
    grad_out, query, key, value, out, lse, tiles, grad_query, delta,
    grad_row, grad_head, query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head,
    to_row, to_head, L, scale, scale_log2, cap_log2, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient to a tile's queries, and `delta`: what each query's output and its gradient come to, multiplied."""
    head = tl.program_id(0) % HEADS
    segment, length, first, prompt, prompt_length = line_of(tiles, tl.program_id(0) // HEADS)
    place = first + tl.arange(0, M)
    there = place < length
    q = load_rows(query + offset_of(segment, query_row) + head * query_head, place, query_row, there, D, BLOCK_D)
    grad_out += offset_of(segment, grad_row) + head * grad_head
    out += offset_of(segment, out_row) + head * out_head
    grad = load_rows(grad_out, place, grad_row, there, DV, BLOCK_DV)
    o = load_rows(out, place, out_row, there, DV, BLOCK_DV)
    of_query = offset_of(head, L) + segment + place
    offset = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + of_query, offset, mask=there)
    lse_log2 = tl.load(lse + of_query, mask=there, other=float("inf")) * 1.4426950408889634
    key += head // GROUP * key_head
    value += head // GROUP * value_head
    own_keys, own_values = key + offset_of(segment, key_row), value + offset_of(segment, value_row)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    prompt_first, own_first, own_end = seen_keys(first, length, prompt_length, window, M, N, WINDOW)
    prompt_keys = key + offset_of(prompt + prompt_length, key_row)
    prompt_values = value + offset_of(prompt + prompt_length, value_row)
    acc = _to_query(
        q, grad, prompt_keys, prompt_values, key_row, value_row, prompt_first, 0, place, window,
        lse_log2, offset, acc, scale_log2, cap_log2, D, BLOCK_D, DV, BLOCK_DV, N, WINDOW, CAP, PRECISION, STAGES,
    )  # fmt: skip
    acc = _to_query(
        q, grad, own_keys, own_values, key_row, value_row, own_first, own_end, place, window,
        lse_log2, offset, acc, scale_log2, cap_log2, D, BLOCK_D, DV, BLOCK_DV, N, WINDOW, CAP, PRECISION, STAGES,
    )  # fmt: skip
    grad_query += offset_of(segment, to_row) + head * to_head
    store_rows(grad_query, place, to_row, there, acc * scale, D, BLOCK_D)


@triton.jit
def _to_keys(
    queries, grads, lse, delta, query_row, grad_row, end, k, v, n, key_places, places, window, grad_key,
    grad_value, scale_log2, cap_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What queries 0..end add to the gradients of a block of keys and values; each sees those with n <= its number."""
    for start in tl.range(0, end, M, num_stages=STAGES):
        m = start + tl.arange(0, M)
        there = m < end
        q = load_rows(queries, m, query_row, there, D, BLOCK_D)
        lse_log2 = tl.load(lse + m, mask=there, other=float("inf")) * 1.4426950408889634  # its weight is exp(-inf)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights, slope = _weights(scores, lse_log2[None, :], scale_log2, cap_log2, CAP)
        weights = tl.where(n[:, None] <= m[None, :], weights, 0.0)
        if WINDOW:
            apart = tl.load(places + m, mask=there, other=0)[None, :] - key_places[:, None]
            weights = tl.where(apart < window, weights, 0.0)
        grad = load_rows(grads, m, grad_row, there, DV, BLOCK_DV)
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
        offset = tl.load(delta + m, mask=there, other=0.0)
        to_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        to_scores = (weights * (to_weights - offset[None, :]) * slope).to(q.dtype)
        grad_key = tl.dot(to_scores, q, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["L", "window"])
def key_kernel(
    grad_out, query, key, value, lse, delta, jobs, places, grad_key, grad_value, key_parts, value_parts,
    grad_row, grad_head, query_row, query_head, key_row, key_head, value_row, value_head,
    to_key_row, to_key_head, to_value_row, to_value_head, L, scale, scale_log2, cap_log2, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients to a block of keys and values, or that part of them which some of their queries give."""
    kv_head = tl.program_id(0) % KV_HEADS
    key_first, key_count, query_first, query_count, part = line_of(jobs, tl.program_id(0) // KV_HEADS)
    n = tl.arange(0, N)
    there = n < key_count
    k = load_rows(key + offset_of(key_first, key_row) + kv_head * key_head, n, key_row, there, D, BLOCK_D)
    v = load_rows(value + offset_of(key_first, value_row) + kv_head * value_head, n, value_row, there, DV, BLOCK_DV)
    key_places = n
    if WINDOW:
        key_places = tl.load(places + key_first + n, mask=there, other=0)
    to_key = tl.zeros([N, BLOCK_D], tl.float32)
    to_value = tl.zeros([N, BLOCK_DV], tl.float32)
    causal, last = query_first == key_first, query_count  # else the queries are completions', the keys their prompt's
    if WINDOW:
        last = tl.where(causal, tl.minimum(query_count, N - 1 + window), query_count)
    n_seen = tl.where(causal, n, 0)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        queries = query + offset_of(query_first, query_row) + head * query_head
        grads = grad_out + offset_of(query_first, grad_row) + head * grad_head
        of_queries = offset_of(head, L) + query_first
        to_key, to_value = _to_keys(
            queries, grads, lse + of_queries, delta + of_queries, query_row, grad_row, last, k, v, n_seen, key_places,
            places + query_first, window, to_key, to_value, scale_log2, cap_log2,
            D, BLOCK_D, DV, BLOCK_DV, M, WINDOW, CAP, PRECISION, STAGES,
        )  # fmt: skip
    to_key *= scale
    if part < 0:
        grad_key += offset_of(key_first, to_key_row) + kv_head * to_key_head
        grad_value += offset_of(key_first, to_value_row) + kv_head * to_value_head
        store_rows(grad_key, n, to_key_row, there, to_key, D, BLOCK_D)
        store_rows(grad_value, n, to_value_row, there, to_value, DV, BLOCK_DV)
    else:
        key_parts += (offset_of(part, KV_HEADS) + kv_head) * D
        value_parts += (offset_of(part, KV_HEADS) + kv_head) * DV
        store_rows(key_parts, n, KV_HEADS * D, there, to_key, D, BLOCK_D)
        store_rows(value_parts, n, KV_HEADS * DV, there, to_value, DV, BLOCK_DV)


@triton.jit
def _sum(parts, part, stride, number, n, there, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[n, BLOCK_D] of as many parts, one after the other."""
    total = tl.zeros([n.shape[0], BLOCK_D], tl.float32)
    for i in range(number):
        total += load_rows(parts + offset_of(part + i * stride, KV_HEADS) * D, n, KV_HEADS * D, there, D, BLOCK_D)
    return total


@triton.jit
def sum_kernel(
    key_parts, value_parts, sums, grad_key, grad_value, to_key_row, to_key_head, to_value_row, to_value_head,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The gradients to N of a block of a prompt's keys and values: the sum of what its parts give."""
    kv_head = tl.program_id(0) % KV_HEADS
    key_first, count, part, stride, number = line_of(sums, tl.program_id(0) // KV_HEADS)
    n = tl.program_id(1) * N + tl.arange(0, N)
    there = n < count
    to_key = _sum(key_parts + kv_head * D, part, stride, number, n, there, KV_HEADS, D, BLOCK_D)
    to_value = _sum(value_parts + kv_head * DV, part, stride, number, n, there, KV_HEADS, DV, BLOCK_DV)
    grad_key += offset_of(key_first, to_key_row) + kv_head * to_key_head
    grad_value += offset_of(key_first, to_value_row) + kv_head * to_value_head
    store_rows(grad_key, n, to_key_row, there, to_key, D, BLOCK_D)
    store_rows(grad_value, n, to_value_row, there, to_value, DV, BLOCK_DV)
