"""The products of a decode step in Triton, each with what comes after it: see `decode_linear`.

A few rows meet a whole weight, so that time is the weight's way from memory. Programs are cut to be about one for each
multiprocessor: a tile of the weight's rows times a part of the inner dimension. Parts are added up in a fixed order by
the program that is done last, which then makes what comes after. More rows than LARGEST_ROWS, and a weight that takes
longer to read than a launch, are multiplied by cuBLAS, and the same kernels do the rest.
Left out on purpose: beginning before the launch before has ended, which made a step of 16 rows slower on a card.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_math import FUSION, given_or
from distill_kernels.types import Norm, Stream

PROGRAMS = 128  # about one for every multiprocessor of a large card
LARGEST_ROWS = 64  # that a program multiplies
LARGEST_WEIGHT = 32 * 2**20  # bytes, likewise; no card has timed a larger one
TILES = 2**14  # of a launch, at most


class Plan(NamedTuple):
    """How a product is cut up. `plan` chooses; a benchmark may choose otherwise."""

    columns: int
    """Of the result, that a program makes."""
    parts: int
    """Of the inner dimension."""
    inner: int
    """How much of it is held at once."""
    warps: int = 4
    stages: int = 4


def plan(columns: int, inner: int, itemsize: int, rows: int, *, width: int | None = None) -> Plan:
    """For a weight [columns, inner] and so many rows at once; `width` is that of the tiles where it is given."""
    many = rows > 32
    tile = width or (32 if columns <= 32 * PROGRAMS else 64)
    parts = triton.next_power_of_2(max(1, PROGRAMS * 3 // 4 // triton.cdiv(columns, tile)))
    if itemsize > 2:
        return Plan(tile, min(parts, triton.cdiv(inner, 32), 8), 32, stages=2)
    held, stages = (256, 3) if many and tile <= 32 else (128, 4)
    if many and tile > 64:  # what comes after takes longer with each part
        parts = max(1, parts // 2)
    return Plan(tile, min(parts, triton.cdiv(inner, held), 8), held, 8 if many and tile > 64 else 4, stages)


def ready_plan(width: int | None) -> Plan:
    """For a product that is there."""
    return Plan(width or 1024, 1, 16, stages=1)


def stages_of(chosen: Plan, rows: int, itemsize: int, memory: int) -> int:
    """Of a loop over both operands, as many as are wanted and find room in the bytes of a program's shared memory."""
    return max(1, min(chosen.stages, (memory - 8192) // ((rows + chosen.columns) * chosen.inner * itemsize)))


@triton.jit
def _product(
    x_rows, there, w_rows, exists, part,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, INNER: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of x W^T over a part of the inner dimension."""
    WIDTH: tl.constexpr = (K + PARTS * INNER - 1) // (PARTS * INNER) * INNER
    first = part * WIDTH
    last = tl.minimum(first + WIDTH, K)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(first, last, INNER, num_stages=STAGES):
        at = k + tl.arange(0, INNER)
        inside = at < last
        x = tl.load(x_rows[:, None] + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_rows[:, None] + at[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _all_done(
    acc, parts, counters, tile, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores a part of a tile; whether it was the last."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(parts + (tile * PARTS + part) * (ROWS * COLUMNS) + r[:, None] * COLUMNS + c[None, :], acc)
    tl.debug_barrier()
    done = True
    if PARTS > 1:
        done = tl.atomic_add(counters + tile, 1, sem="acq_rel") == PARTS - 1
        if done:
            tl.store(counters + tile, 0)
    return done


@triton.jit
def _summed(rows, columns, mask, STRIDE: tl.constexpr, PARTS: tl.constexpr):
    """The parts of a product at rows + columns, STRIDE from one to the next, added up in order."""
    at = rows[:, None] + columns[None, :]
    total = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * STRIDE, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _reciprocal_rms(squares, r, there, R, eps, K: tl.constexpr, SQUARES: tl.constexpr, BLOCK_S: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of rows, as a column, from the sums over parts of them."""
    s = tl.arange(0, BLOCK_S)
    at = s[None, :] * R + r[:, None]
    found = tl.load(squares + at, mask=there[:, None] & (s < SQUARES)[None, :], other=0.0)
    return (1 / tl.sqrt_rn(tl.sum(found, 1) / K + eps))[:, None]


@triton.jit(do_not_specialize=["R"])
def _heads_kernel(
    x, squares, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias, query_norm, key_norm,
    cos, sin, out, parts, counters, R, eps, query_eps, key_eps,
    K: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, BIAS: tl.constexpr,
    HEAD_NORM: tl.constexpr, SQUARES: tl.constexpr, BLOCK_S: tl.constexpr, READY: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = HQ + 2 * HKV
    HALF: tl.constexpr = ROTARY // 2
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS
    weight, bias, head_norm, head_eps, own = query_weight, query_bias, query_norm, query_eps, head
    if head >= HQ:
        weight, bias, head_norm, head_eps, own = key_weight, key_bias, key_norm, key_eps, head - HQ
    if head >= HQ + HKV:
        weight, bias, own = value_weight, value_bias, head - HQ - HKV
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = r < R
    d = tl.arange(0, COLUMNS)
    exists = d < D
    done = True
    if READY:
        rows = parts + r.to(tl.int64) * (HEADS * D) + head * D
    else:
        acc = _product(
            x + r.to(tl.int64) * K, there, weight + (own * D + d).to(tl.int64) * K, exists, part,
            K, ROWS, COLUMNS, PARTS, INNER, STAGES, PRECISION,
        )  # fmt: skip
        done = _all_done(acc, parts, counters, head, part, ROWS, COLUMNS, PARTS)
        rows = parts + head * (PARTS * ROWS * COLUMNS) + tl.arange(0, ROWS) * COLUMNS
    if done:
        other_d = tl.where(d < HALF, d + HALF, tl.where(d < ROTARY, d - HALF, d))
        mask = there[:, None] & exists[None, :]
        scale = _reciprocal_rms(squares, r, there, R, eps, K, SQUARES, BLOCK_S)
        found = _summed(rows, d, mask, ROWS * COLUMNS, PARTS) * scale
        other = _summed(rows, other_d, mask, ROWS * COLUMNS, PARTS) * scale
        if BIAS:
            found += tl.load(bias + own * D + d, mask=exists, other=0.0).to(tl.float32)[None, :]
            other += tl.load(bias + own * D + other_d, mask=exists, other=0.0).to(tl.float32)[None, :]
        if head < HQ + HKV:
            if HEAD_NORM:
                scale = (1 / tl.sqrt_rn(tl.sum(found * found, 1) / D + head_eps))[:, None]
                found *= scale * tl.load(head_norm + d, mask=exists, other=0.0).to(tl.float32)[None, :]
                other *= scale * tl.load(head_norm + other_d, mask=exists, other=0.0).to(tl.float32)[None, :]
            turned = there[:, None] & (d < ROTARY)[None, :]
            at = r.to(tl.int64)[:, None] * ROTARY + d[None, :]
            cosine = tl.load(cos + at, mask=turned, other=1.0)
            sine = tl.load(sin + at, mask=turned, other=0.0)
            found = found * cosine + tl.where((d < HALF)[None, :], -other, other) * sine
        at = (r.to(tl.int64)[:, None] * HEADS + head) * D + d[None, :]
        tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _gate_kernel(
    x, squares, gate, out, parts, counters, R, up_offset, eps,
    K: tl.constexpr, N: tl.constexpr, SQUARES: tl.constexpr, BLOCK_S: tl.constexpr, READY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = COLUMNS // 2
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = r < R
    half = tl.arange(0, HALF)
    inside = there[:, None] & (tile * HALF + half < N)[None, :]
    done = True
    if READY:
        rows = parts + r.to(tl.int64) * (2 * N) + tile * HALF
        gates = _summed(rows, half, inside, 0, 1)
        ups = _summed(rows + N, half, inside, 0, 1)
    else:
        c = tl.arange(0, COLUMNS)  # columns of gate and up in turn
        n = tile * HALF + c // 2
        w_rows = gate + (n.to(tl.int64) * K + c % 2 * up_offset)
        acc = _product(
            x + r.to(tl.int64) * K, there, w_rows, n < N, part,
            K, ROWS, COLUMNS, PARTS, INNER, STAGES, PRECISION,
        )  # fmt: skip
        gates, ups = tl.split(tl.reshape(acc, [ROWS, HALF, 2]))
        if PARTS > 1:
            done = _all_done(acc, parts, counters, tile, part, ROWS, COLUMNS, PARTS)
            if done:
                rows = parts + tile * (PARTS * ROWS * COLUMNS) + tl.arange(0, ROWS) * COLUMNS
                gates = _summed(rows, 2 * half, inside, ROWS * COLUMNS, PARTS)
                ups = _summed(rows, 2 * half + 1, inside, ROWS * COLUMNS, PARTS)
    if done:
        scale = _reciprocal_rms(squares, r, there, R, eps, K, SQUARES, BLOCK_S)
        gates = gates * scale
        found = gates / (1 + tl.exp(-gates)) * (ups * scale)
        at = r.to(tl.int64)[:, None] * N + (tile * HALF + half)[None, :]
        tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def _add_kernel(
    x, weight, bias, residual, norm, out, scaled, squares, parts, counters, R,
    K: tl.constexpr, N: tl.constexpr, BIAS: tl.constexpr, READY: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = r < R
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    exists = n < N
    done = True
    if READY:
        rows = parts + r.to(tl.int64) * N + tile * COLUMNS
    else:
        acc = _product(
            x + r.to(tl.int64) * K, there, weight + n.to(tl.int64) * K, exists, part,
            K, ROWS, COLUMNS, PARTS, INNER, STAGES, PRECISION,
        )  # fmt: skip
        done = _all_done(acc, parts, counters, tile, part, ROWS, COLUMNS, PARTS)
        rows = parts + tile * (PARTS * ROWS * COLUMNS) + tl.arange(0, ROWS) * COLUMNS
    if done:
        inside = there[:, None] & exists[None, :]
        found = _summed(rows, tl.arange(0, COLUMNS), inside, ROWS * COLUMNS, PARTS)
        if BIAS:
            found += tl.load(bias + n, mask=exists, other=0.0).to(tl.float32)[None, :]
        at = r.to(tl.int64)[:, None] * N + n[None, :]
        found += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = found.to(out.dtype.element_ty)
        tl.store(out + at, rounded, mask=inside)
        found = rounded.to(tl.float32)
        weighed = found * tl.load(norm + n, mask=exists, other=0.0).to(tl.float32)[None, :]
        tl.store(scaled + at, weighed.to(scaled.dtype.element_ty), mask=inside)
        tl.store(squares + tile * R + r, tl.sum(tl.where(inside, found * found, 0.0), 1), mask=there)


def heads(
    stream: Stream,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: tuple[Norm, Norm] | None,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
) -> None:
    """Writes out [R, Hq + 2 Hkv, D]; see `normed_heads`."""
    x, number, D = stream.scaled, out.shape[1], out.shape[2]
    query_heads, key_heads = (len(weight) // D for weight in weights[:2])
    query_norm, key_norm = norms or (Norm(cos, eps), Norm(cos, eps))
    grid, options, parts, _ = _launch(x, weights, number, max(16, triton.next_power_of_2(D)), 16)
    _heads_kernel[grid](
        x, stream.squares, *weights, *(given_or(bias, x) for bias in biases), query_norm.weight, key_norm.weight,
        cos, sin, out, parts, counters(x.device), len(x), eps, query_norm.eps, key_norm.eps,
        K=x.shape[1], HQ=query_heads, HKV=key_heads, D=D, ROTARY=cos.shape[1], BIAS=biases[0] is not None,
        HEAD_NORM=norms is not None, **_squares(stream), **options,
    )  # fmt: skip


def gate(stream: Stream, eps: float, gate_weight: Tensor, up_weight: Tensor, out: Tensor) -> None:
    """Writes out [R, I]; see `normed_gate`."""
    x = stream.scaled
    grid, options, parts, _ = _launch(x, [gate_weight, up_weight], None, None, 2)
    # Of two bases, one for each column, the compiler knows too little to copy ahead.
    up_offset = (up_weight.data_ptr() - gate_weight.data_ptr()) // x.itemsize
    _gate_kernel[grid](
        x, stream.squares, gate_weight, out, parts, counters(x.device), len(x), up_offset, eps, K=x.shape[1],
        N=out.shape[1], **_squares(stream), **options,
    )  # fmt: skip


def add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor) -> Stream:
    """See `added`."""
    grid, options, parts, tiles = _launch(x, [weight], None, None, 2)
    squares = torch.empty(tiles, len(x), dtype=torch.float32, device=x.device)
    made = Stream(torch.empty_like(residual), torch.empty_like(residual), squares)
    _add_kernel[grid](
        x, weight, given_or(bias, x), residual, norm, *made, parts, counters(x.device), len(x), K=x.shape[1],
        N=len(weight), BIAS=bias is not None, **options,
    )  # fmt: skip
    return made


def _squares(stream: Stream) -> dict[str, int]:
    number = len(stream.squares)
    return {"SQUARES": number, "BLOCK_S": triton.next_power_of_2(number)}


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Of each tile, how many of its parts are done: 0 before and after every launch."""
    return torch.zeros(TILES, dtype=torch.int32, device=device)


class _Launch(NamedTuple):
    grid: tuple[int, int]
    options: dict[str, Any]
    """Which all kernels have."""
    parts: Tensor
    """Room for the parts of tiles, or the product that cuBLAS has made, float32 [R, N]."""
    tiles: int
    """In a block of rows."""


def _launch(x: Tensor, weights: Sequence[Tensor], tiles: int | None, width: int | None, ready_rows: int) -> _Launch:
    """`tiles` of the `width`, or as `plan` cuts the weights; where the product is ready, `ready_rows` at once."""
    (R, K), N = x.shape, sum(map(len, weights))
    ready = R > LARGEST_ROWS or N * K * x.itemsize > LARGEST_WEIGHT
    if ready:
        rows, chosen = ready_rows, ready_plan(width)
    else:
        rows = max(16, triton.next_power_of_2(R))
        chosen = plan(N, K, x.itemsize, rows, width=width)
    tiles = tiles or triton.cdiv(N, chosen.columns)
    blocks = triton.cdiv(R, rows)  # one, where a kernel multiplies
    if tiles > TILES and not ready:
        raise ValueError(f"a weight of {tiles} tiles, more than the {TILES} that there is room for")
    options = {
        "READY": ready, "ROWS": rows, "COLUMNS": chosen.columns, "PARTS": chosen.parts, "INNER": chosen.inner,
        "STAGES": stages_of(chosen, rows, x.itemsize, _shared_memory(x.device)), "PRECISION": "ieee",
        "num_warps": chosen.warps, **FUSION,
    }  # fmt: skip
    if ready:
        parts = _multiplied(x, weights)
    else:
        number = tiles * chosen.parts * rows * chosen.columns
        parts = torch.empty(number, dtype=torch.float32, device=x.device)
    return _Launch((tiles * chosen.parts, blocks), options, parts, tiles)


def _multiplied(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x W^T for the weights side by side, float32: one product where they lie one behind the other in memory."""
    N, K = sum(map(len, weights)), x.shape[1]
    first, ends = weights[0], [weight.data_ptr() + weight.nbytes for weight in weights]
    if all(weight.data_ptr() == end for weight, end in zip(weights[1:], ends, strict=False)):
        shared = all(weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for weight in weights)
        weights = [first.as_strided((N, K), (K, 1))] if shared else weights
    product, start = torch.empty(len(x), N, dtype=torch.float32, device=x.device), 0
    for weight in weights:
        out = product[:, start : start + len(weight)]
        if x.dtype == torch.float32:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
        start += len(weight)
    return product


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0
