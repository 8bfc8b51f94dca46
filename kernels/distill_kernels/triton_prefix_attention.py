"""Packed attention with shared prompts in Triton: a kernel forward, and two backward in triton_prefix_gradients.py.

A token's keys are its prompt's and, up to itself, its own segment's. A program has a block of a segment's queries and a
head and goes over both, so that nothing has to be merged. Tables made on the host (`PrefixLayout.tiles`, `.jobs`) say
what a program does. Scores are kept in units of log 2.

Products: 2 forward and 7 backward a pair of query and key, of which 5 are necessary; the other two, the scores and
their gradients made twice, save atomics, whose order no two runs share.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.prefix_layout import PrefixLayout
from distill_kernels.triton_heads import load_rows, store_rows, tanh
from distill_kernels.triton_math import FUSION, given_or, offset_of
from distill_kernels.triton_prefix_blocks import (
    SUMMED,
    Call,
    blocks,
    line_of,
    seen_by,
    seen_keys,
    sizes,
    strides_of,
)
from distill_kernels.triton_prefix_gradients import key_kernel, query_kernel, sum_kernel


@triton.jit
def _attend(
    query, keys, values, key_row, value_row, first, end, place, window, peak, total, acc, scale_log2, cap_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Goes on with the keys at positions first..end from `peak`, `total` and `acc`."""
    for start in tl.range(first, end, N, num_stages=STAGES):
        n = start + tl.arange(0, N)
        k = load_rows(keys, n, key_row, n < end, D, BLOCK_D)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale_log2
        if CAP:
            scores = tanh(scores) * cap_log2
        scores = tl.where(seen_by(place, n, end, window, WINDOW), scores, float("-inf"))
        new = tl.maximum(tl.maximum(peak, tl.max(scores, 1)), -1e30)  # of a query that has seen nothing yet
        weights = tl.exp2(scores - new[:, None])
        move = tl.exp2(peak - new)
        total = total * move + tl.sum(weights, 1)
        v = load_rows(values, n, value_row, n < end, DV, BLOCK_DV)
        acc = tl.dot(weights.to(v.dtype), v, acc * move[:, None], input_precision=PRECISION)
        peak = new
    return peak, total, acc


@triton.jit(do_not_specialize=["L", "window"])
def _forward_kernel(
    query, key, value, sinks, out, lse, tiles,
    query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head, L,
    scale_log2, cap_log2, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    segment, length, first, prompt, prompt_length = line_of(tiles, tl.program_id(0) // HEADS)
    place = first + tl.arange(0, M)
    there = place < length
    query += offset_of(segment, query_row) + head * query_head
    q = load_rows(query, place, query_row, there, D, BLOCK_D)
    key += head // GROUP * key_head
    value += head // GROUP * value_head
    own_keys, own_values = key + offset_of(segment, key_row), value + offset_of(segment, value_row)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    prompt_first, own_first, own_end = seen_keys(first, length, prompt_length, window, M, N, WINDOW)
    prompt_keys = key + offset_of(prompt + prompt_length, key_row)
    prompt_values = value + offset_of(prompt + prompt_length, value_row)
    peak, total, acc = _attend(
        q, prompt_keys, prompt_values, key_row, value_row, prompt_first, 0, place, window, peak, total, acc,
        scale_log2, cap_log2, D, BLOCK_D, DV, BLOCK_DV, N, WINDOW, CAP, PRECISION, STAGES,
    )  # fmt: skip
    peak, total, acc = _attend(
        q, own_keys, own_values, key_row, value_row, own_first, own_end, place, window, peak, total, acc,
        scale_log2, cap_log2, D, BLOCK_D, DV, BLOCK_DV, N, WINDOW, CAP, PRECISION, STAGES,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(peak, sink)
        move = tl.exp2(peak - new)
        total = total * move + tl.exp2(sink - new)
        acc *= move[:, None]
        peak = new
    out += offset_of(segment, out_row) + head * out_head
    store_rows(out, place, out_row, there, acc / total[:, None], DV, BLOCK_DV)
    tl.store(lse + offset_of(head, L) + segment + place, (peak + tl.log2(total)) * 0.6931471805599453, mask=there)


def statistics_shape(L: int, h: int) -> tuple[int, int]:
    """Of the log-sum-exps that `forward` keeps for `backward`."""
    return h, L


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
    """Output [L, h, dv] and log-sum-exp [h, L] float32; see `prefix_attention`."""
    call = Call(scale, window, softcap)
    L, heads, d = query.shape
    out = query.new_empty(L, heads, value.shape[-1])
    lse = torch.empty(heads, L, dtype=torch.float32, device=query.device)
    block, _, _ = blocks(max(d, value.shape[-1]), query.device)
    tiles = layout.tiles(block.queries)
    _forward_kernel[(len(tiles) * heads,)](
        query, key, value, given_or(sinks, lse), out, lse, tiles, *strides_of(query, key, value, out), L,
        *call.numbers(), HEADS=heads, SINKS=sinks is not None, **call.constants(query, key, value), **sizes(block),
        **FUSION,
    )  # fmt: skip
    return out, lse


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
    call = Call(scale, window, softcap)
    L, heads, d = query.shape
    constants, kv_heads = call.constants(query, key, value), key.shape[1]
    grad_query, grad_key, grad_value = (each.new_empty(each.shape) for each in (query, key, value))
    delta = torch.empty_like(lse)
    _, block, key_block = blocks(max(d, value.shape[-1]), query.device)
    tiles = layout.tiles(block.queries)
    query_kernel[(len(tiles) * heads,)](
        grad_out, query, key, value, out, lse, tiles, grad_query, delta,
        *strides_of(grad_out, query, key, value, out, grad_query), L, scale, *call.numbers(),
        HEADS=heads, **constants, **sizes(block), **FUSION,
    )  # fmt: skip
    plan = layout.jobs(key_block.keys, kv_heads, window)
    parts = [each.new_empty(plan.part_rows, *each.shape[1:], dtype=torch.float32) for each in (key, value)]
    key_kernel[(len(plan.jobs) * kv_heads,)](
        grad_out, query, key, value, lse, delta, plan.jobs, given_or(plan.places, plan.jobs), grad_key, grad_value,
        *parts, *strides_of(grad_out, query, key, value, grad_key, grad_value), L, scale, *call.numbers(),
        KV_HEADS=kv_heads, **constants, **sizes(key_block), **FUSION,
    )  # fmt: skip
    if plan.part_rows:
        of_heads = {name: constants[name] for name in ("D", "BLOCK_D", "DV", "BLOCK_DV")}
        sum_kernel[(len(plan.sums) * kv_heads, triton.cdiv(key_block.keys, SUMMED))](
            *parts, plan.sums, grad_key, grad_value, *strides_of(grad_key, grad_value), KV_HEADS=kv_heads, N=SUMMED,
            num_warps=4, **of_heads, **FUSION,
        )  # fmt: skip
    if sinks is None:
        return grad_query, grad_key, grad_value, None
    share = (sinks[:, None] - lse).exp()
    return grad_query, grad_key, grad_value, -(share * delta).sum(1).to(sinks.dtype)
