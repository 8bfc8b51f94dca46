"""The student's product on Hopper, with the row statistics and the logit gradient made in its epilogue.

The teacher's float32 logits of the chunk are there already. One persistent kernel multiplies the student's hidden
states with its head, tile by tile; while a tile's logits are still accumulators it reads the teacher's, makes the
partial sums of both models in float32, and stores in half precision, with x and y the logits in bits (log2) less those
of the row's own token,

    E = 2^(x - k)              k = 0 unless something in the tile is 2^64 times as probable as the token
    F = E (d - a)              d = x - y, a its mean under E over 64 columns; for `reverse_kl` only

k, and k_t for y, are integers that go into the token's logit before it is subtracted: what is probable stays exact.

`triton_product_rows` turns the partial sums into what `triton_rows` gives for a row. The gradient in the logits is then
factor / S (E - S onehot) for `sampled_reverse_kl`, S the sum of E: the row's factor is applied to H columns instead of
V, and only the token's own column is put right. For `reverse_kl` it is (F + (a - mean) E) / S, made in place of F.
The student's logits are never stored. Half precision rounds the sampled gradient once, as in `triton_rows`; that of
`reverse_kl` again as it is combined, of which F keeps the first rounding small where the models agree.

Left out: biases, softcaps, and the objectives that need the teacher's normaliser for the gradient.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distill_kernels.triton_product_rows import (
    OWN,
    PARTS,
    REF_S,
    REF_T,
    REVERSE,
    SAMPLED,
    Scratch,
    combine,
    finish,
    put_target,
)
from distill_kernels.triton_product_rows import scratch as new_scratch
from distill_kernels.types import Head

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Of the product: the shape of its tiles, and how a program works on one."""

    rows: int
    columns: int
    inner: int
    stages: int
    warps: int


TILE = Tile(128, 256, 64, 3, 8)  # tests make it smaller; with four stages the shared memory is too small

PREFETCH = False  # of the teacher's logits, while the product before their use runs


@triton.jit(do_not_specialize=["row_stride"], do_not_specialize_on_alignment=["token_ids", "per_row"])
def _references_kernel(
    hidden, weight, teacher, token_ids, per_row, hidden_stride, weight_stride, teacher_stride, row_stride, V,
    student_bits, teacher_bits, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both models' logits of the row's own token, in bits: one program a row. 0 and NaN for a token there is not."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row)
    exists = (token >= 0) & (token < V)
    token = tl.where(exists, token, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + row * hidden_stride + at, mask=at < H, other=0.0)
        w = tl.load(weight + token * weight_stride + at, mask=at < H, other=0.0)
        total += h.to(tl.float32) * w.to(tl.float32)
    y = tl.load(teacher + row * teacher_stride + token) * teacher_bits
    tl.store(per_row + REF_S * row_stride + row, tl.where(exists, tl.sum(total, 0) * student_bits, 0.0))
    tl.store(per_row + REF_T * row_stride + row, tl.where(exists, y, 0.0))
    tl.store(per_row + OWN * row_stride + row, tl.where(exists, 0.0, float("nan")))


@triton.jit
def _tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: down GROUP rows of tiles, then to the next column, so that the weight is read once."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + tile % per_group % size, tile % per_group // size


@triton.jit
def _epilogue_part(
    acc, base_s, ref_t, teacher_desc, e_desc, f_desc, row, column, student_bits, teacher_bits, no_column_t,
    sum_s, sum_t, own_s, own_t, cross, shift_t, OBJECTIVE: tl.constexpr,
):  # fmt: skip
    """A part of a tile's columns: stores its planes, and adds to the sums of the tile's rows, which are relative to
    the largest k_t so far. Then a, and that k_t."""
    x = acc * student_bits - base_s[:, None]
    e = tl.exp2(x)
    part_s = tl.sum(e, 1)
    # Past the last column: asked of x, so that y has the layout of the accumulators.
    y = tl.where(x <= -1e29, no_column_t, teacher_desc.load([row, column]))
    new_t = tl.maximum(tl.ceil(tl.max(y * teacher_bits, 1) - ref_t) - 64, shift_t)
    moved = new_t - shift_t
    y = y * teacher_bits - (ref_t + new_t)[:, None]
    f = tl.exp2(y)
    own_t = (own_t - sum_t * moved) * tl.exp2(-moved) + tl.sum(f * y, 1)
    sum_t = sum_t * tl.exp2(-moved) + tl.sum(f, 1)
    own_s += tl.sum(e * x, 1)
    d = x - y
    part_cross = tl.sum(e * d, 1)
    mean = tl.where(part_s > 0, part_cross / part_s, 0.0)
    e_desc.store([row, column], e.to(e_desc.dtype))
    if OBJECTIVE == REVERSE:
        f_desc.store([row, column], (e * (d - mean[:, None])).to(f_desc.dtype))
    cross += sum_s * moved + part_cross
    return sum_s + part_s, sum_t, own_s, own_t, cross, new_t, mean


@triton.jit
def _store_sums(at, tiles, row_stride, inside, sum_s, sum_t, own_s, own_t, cross, shift_s, shift_t):
    """The seven partial sums of a tile's rows."""
    step = tl.cast(tiles, tl.int64) * row_stride
    tl.store(at, sum_s, mask=inside)
    tl.store(at + step, sum_t, mask=inside)
    tl.store(at + 2 * step, own_s, mask=inside)
    tl.store(at + 3 * step, own_t, mask=inside)
    tl.store(at + 4 * step, cross, mask=inside)
    tl.store(at + 5 * step, shift_s, mask=inside)
    tl.store(at + 6 * step, shift_t, mask=inside)


@triton.jit
def _prefetch(teacher, stride, row, column, R, V, BM: tl.constexpr, BN: tl.constexpr):
    """Asks for the teacher's logits of a tile to be brought from memory to the L2 cache, 128 bytes at once."""
    LINE: tl.constexpr = 32
    rows = tl.minimum(row + tl.arange(0, BM), R - 1)
    cols = tl.minimum(column + LINE * tl.arange(0, BN // LINE), V - 1)
    at = teacher + tl.cast(rows, tl.int64)[:, None] * stride + cols[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["R", "row_stride"], do_not_specialize_on_alignment=["token_ids", "per_row"])
def _product_kernel(
    hidden_desc, weight_desc, teacher_desc, e_desc, f_desc, teacher, token_ids, per_row, part, means,
    R, V, teacher_stride, row_stride, student_bits, teacher_bits, no_column_s, no_column_t,
    STEPS: tl.constexpr, OBJECTIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """E, F and the partial sums, as `Scratch` has them, of all tiles: a program takes every PROGRAMS-th."""
    tiles_m = tl.cdiv(R, BM)
    tiles_n = tl.cdiv(V, BN)
    SUB: tl.constexpr = BN // 4
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tm, tn = _tile_of(tile, tiles_m, tiles_n, GROUP)
        row = tm * BM
        column = tn * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(STEPS):
            h = hidden_desc.load([row, k * BK])
            w = weight_desc.load([column, k * BK])
            acc = tl.dot(h, w.T, acc)
        rows = row + tl.arange(0, BM)
        cols = column + tl.arange(0, BN)
        inside = rows < R
        ref_s = tl.load(per_row + REF_S * row_stride + rows, mask=inside, other=0.0)
        ref_t = tl.load(per_row + REF_T * row_stride + rows, mask=inside, other=0.0)
        acc = tl.where((cols < V)[None, :], acc, no_column_s)
        token = tl.load(token_ids + rows, mask=inside, other=-1)
        here = (token >= column) & (token < column + BN) & (token < V)
        if tl.max(here.to(tl.int32), 0) > 0:
            own = tl.sum(tl.where(cols[None, :] == token[:, None].to(tl.int32), acc, 0.0), 1)
            tl.store(per_row + OWN * row_stride + rows, own * student_bits - ref_s, mask=here)
        shift = tl.maximum(tl.ceil(tl.max(acc * student_bits, 1) - ref_s) - 64, 0.0)
        base = ref_s + shift
        zero = tl.zeros_like(shift)
        acc0, acc1 = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        acc00, acc01 = tl.split(tl.permute(tl.reshape(acc0, (BM, 2, SUB)), (0, 2, 1)))
        acc10, acc11 = tl.split(tl.permute(tl.reshape(acc1, (BM, 2, SUB)), (0, 2, 1)))
        sum_s, sum_t, own_s, own_t, cross, shift_1, mean_0 = _epilogue_part(
            acc00, base, ref_t, teacher_desc, e_desc, f_desc, row, column, student_bits, teacher_bits,
            no_column_t, zero, zero, zero, zero, zero, zero, OBJECTIVE,
        )  # fmt: skip
        sum_s, sum_t, own_s, own_t, cross, shift_2, mean_1 = _epilogue_part(
            acc01, base, ref_t, teacher_desc, e_desc, f_desc, row, column + SUB, student_bits, teacher_bits,
            no_column_t, sum_s, sum_t, own_s, own_t, cross, shift_1, OBJECTIVE,
        )  # fmt: skip
        sum_s, sum_t, own_s, own_t, cross, shift_3, mean_2 = _epilogue_part(
            acc10, base, ref_t, teacher_desc, e_desc, f_desc, row, column + 2 * SUB, student_bits, teacher_bits,
            no_column_t, sum_s, sum_t, own_s, own_t, cross, shift_2, OBJECTIVE,
        )  # fmt: skip
        sum_s, sum_t, own_s, own_t, cross, shift_4, mean_3 = _epilogue_part(
            acc11, base, ref_t, teacher_desc, e_desc, f_desc, row, column + 3 * SUB, student_bits, teacher_bits,
            no_column_t, sum_s, sum_t, own_s, own_t, cross, shift_3, OBJECTIVE,
        )  # fmt: skip
        if OBJECTIVE == REVERSE:
            to_mean = means + tl.cast(tn, tl.int64) * 4 * row_stride + rows
            tl.store(to_mean, mean_0 + (shift_4 - shift_1), mask=inside)
            tl.store(to_mean + row_stride, mean_1 + (shift_4 - shift_2), mask=inside)
            tl.store(to_mean + 2 * row_stride, mean_2 + (shift_4 - shift_3), mask=inside)
            tl.store(to_mean + 3 * row_stride, mean_3, mask=inside)
        at = part + tl.cast(tn, tl.int64) * row_stride + rows
        _store_sums(at, tiles_n, row_stride, inside, sum_s, sum_t, own_s, own_t, cross, shift, shift_4)
        if PREFETCH:
            following = tl.minimum(tile + PROGRAMS, tiles_m * tiles_n - 1)
            next_m, next_n = _tile_of(following, tiles_m, tiles_n, GROUP)
            _prefetch(teacher, teacher_stride, next_m * BM, next_n * BN, R, V, BM, BN)


def scratch(rows: int, V: int, objective: int, device: torch.device) -> Scratch:
    """For chunks of at most `rows` rows."""
    return new_scratch(rows, V, TILE.columns, objective, device)


def distill_product(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    e: Tensor,
    room: Scratch,
    token_ids: Tensor,
    sampling_logprob: Tensor | None,
    stats: Tensor,
    losses: Tensor,
    row_scale: Tensor,
    grad: Tensor,
    *,
    advantage: Tensor | None,
    objective: int,
    importance_clip: float | None,
    temperature: float,
    student_head: Head,
    teacher_head: Head,
) -> None:
    """As `triton_rows.distill_rows`, from the student's hidden states [k, H] and weight [V, H] and the teacher's raw
    logits [k, V]. `e` [k, V] is room for E; `grad` is `e` itself for `sampled_reverse_kl`, and another such buffer for
    `reverse_kl`.
    """
    bits = tuple(head.scale / temperature * LOG2_E for head in (student_head, teacher_head))
    token_ids = token_ids.contiguous()
    launch_references(hidden, weight, teacher, token_ids, room, bits)
    launch_product(hidden, weight, teacher, token_ids, e, grad, room, bits, objective)
    finish(
        room,
        sampling_logprob,
        advantage,
        stats,
        losses,
        row_scale,
        objective=objective,
        importance_clip=importance_clip,
    )
    if objective == SAMPLED.value:
        put_target(room, e, token_ids, TILE.columns)
    else:
        combine(room, e, grad, TILE.columns)


def launch_references(
    hidden: Tensor, weight: Tensor, teacher: Tensor, token_ids: Tensor, room: Scratch, bits: tuple[float, float]
) -> None:
    """The tokens' own logits; `bits` are the units of the two models' raw logits."""
    V, H = weight.shape
    _references_kernel[(len(hidden),)](
        hidden, weight, teacher, token_ids, room.per_row, hidden.stride(0), weight.stride(0), teacher.stride(0),
        room.per_row.stride(0), V, *bits, H=H, BLOCK=min(1024, triton.next_power_of_2(H)), num_warps=4,
    )  # fmt: skip


def launch_product(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    e: Tensor,
    grad: Tensor,
    room: Scratch,
    bits: tuple[float, float],
    objective: int,
) -> None:
    """E, F and the partial sums of a chunk."""
    V, H = weight.shape
    columns = TILE.columns // PARTS
    blocks = (TILE.rows, TILE.inner), (TILE.columns, TILE.inner), *[(TILE.rows, columns)] * 3
    tensors = hidden, weight, teacher, e, grad
    descriptors = [TensorDescriptor.from_tensor(t, list(block)) for t, block in zip(tensors, blocks, strict=True)]
    on_gpu = hidden.is_cuda
    programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count if on_gpu else 3
    _product_kernel[(programs,)](
        *descriptors, teacher, token_ids, room.per_row, room.part, room.means, len(hidden), V, teacher.stride(0),
        room.per_row.stride(0), *bits, *(-1e30 / unit for unit in bits), STEPS=triton.cdiv(H, TILE.inner),
        OBJECTIVE=objective,
        BM=TILE.rows, BN=TILE.columns, BK=TILE.inner, GROUP=16, PROGRAMS=programs, num_warps=TILE.warps,
        num_stages=TILE.stages, PREFETCH=PREFETCH and on_gpu,
    )  # fmt: skip
