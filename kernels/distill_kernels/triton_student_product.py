"""The student's product on Hopper, with the row statistics and the logit gradient made in its epilogue.

The teacher's float32 logits of the chunk are there already. One persistent kernel multiplies the student's hidden
states with its head, tile by tile; while a tile's logits are still accumulators it reads the teacher's, makes the
partial sums of both models in float32, and stores in half precision, with x and y the logits in bits (log2) less those
of the row's own token,

    E = 2^(x - k)              k = 0 unless something in the tile is 2^64 times as probable as the token

k, and k_t for y, are integers that go into the token's logit before it is subtracted: what is probable stays exact.

`triton_product_rows` turns the partial sums into what `triton_rows` gives for a row. The gradient in the logits is then
factor / S (E - S onehot), S the sum of E: the row's factor is applied to H columns instead of V, and only the token's
own column is put right. The student's logits are never stored. Half precision rounds each entry once, and the token's,
1 - S, is most of its row: the row's factor is multiplied by (1 - S) / round(1 - S), which makes that entry exact and
moves all others together, by half a unit in the last place at most. The factor rounds what it is multiplied with.

Left out: biases, softcaps, and the objectives that need the teacher's normaliser for the gradient. Asking the L2 cache
for the next tile's teacher logits during the product made it slower.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distill_kernels.triton_product_rows import OWN, REF_S, REF_T, Scratch, finish, put_target
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
PARTS = 4  # of a tile's columns in the epilogue


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
    acc, base_s, ref_t, teacher_desc, e_desc, row, column, student_bits, teacher_bits, no_column_t,
    sum_s, sum_t, own_s, own_t, cross, shift_t,
):  # fmt: skip
    """A part of a tile's columns: stores E, and adds to the sums of the tile's rows, which are relative to the largest
    k_t so far. Then that k_t."""
    x = acc * student_bits - base_s[:, None]
    e = tl.exp2(x)
    # Past the last column: asked of x, so that y has the layout of the accumulators.
    y = tl.where(x <= -1e29, no_column_t, teacher_desc.load([row, column]))
    new_t = tl.maximum(tl.ceil(tl.max(y * teacher_bits, 1) - ref_t) - 64, shift_t)
    moved = new_t - shift_t
    y = y * teacher_bits - (ref_t + new_t)[:, None]
    f = tl.exp2(y)
    own_t = (own_t - sum_t * moved) * tl.exp2(-moved) + tl.sum(f * y, 1)
    sum_t = sum_t * tl.exp2(-moved) + tl.sum(f, 1)
    own_s += tl.sum(e * x, 1)
    cross += sum_s * moved + tl.sum(e * (x - y), 1)
    e_desc.store([row, column], e.to(e_desc.dtype))
    return sum_s + tl.sum(e, 1), sum_t, own_s, own_t, cross, new_t


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


@triton.jit(do_not_specialize=["R", "row_stride"], do_not_specialize_on_alignment=["token_ids", "per_row"])
def _product_kernel(
    hidden_desc, weight_desc, teacher_desc, e_desc, token_ids, per_row, part,
    R, V, row_stride, student_bits, teacher_bits, no_column_s, no_column_t,
    STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """E and the partial sums, as `Scratch` has them, of all tiles: a program takes every PROGRAMS-th."""
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
        sum_s, sum_t, own_s, own_t, cross, shift_t = _epilogue_part(
            acc00, base, ref_t, teacher_desc, e_desc, row, column, student_bits, teacher_bits,
            no_column_t, zero, zero, zero, zero, zero, zero,
        )  # fmt: skip
        sum_s, sum_t, own_s, own_t, cross, shift_t = _epilogue_part(
            acc01, base, ref_t, teacher_desc, e_desc, row, column + SUB, student_bits, teacher_bits,
            no_column_t, sum_s, sum_t, own_s, own_t, cross, shift_t,
        )  # fmt: skip
        sum_s, sum_t, own_s, own_t, cross, shift_t = _epilogue_part(
            acc10, base, ref_t, teacher_desc, e_desc, row, column + 2 * SUB, student_bits, teacher_bits,
            no_column_t, sum_s, sum_t, own_s, own_t, cross, shift_t,
        )  # fmt: skip
        sum_s, sum_t, own_s, own_t, cross, shift_t = _epilogue_part(
            acc11, base, ref_t, teacher_desc, e_desc, row, column + 3 * SUB, student_bits, teacher_bits,
            no_column_t, sum_s, sum_t, own_s, own_t, cross, shift_t,
        )  # fmt: skip
        at = part + tl.cast(tn, tl.int64) * row_stride + rows
        _store_sums(at, tiles_n, row_stride, inside, sum_s, sum_t, own_s, own_t, cross, shift, shift_t)


def scratch(rows: int, V: int, device: torch.device) -> Scratch:
    """For chunks of at most `rows` rows."""
    return new_scratch(rows, V, TILE.columns, device)


def distill_product(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    room: Scratch,
    token_ids: Tensor,
    sampling_logprob: Tensor | None,
    stats: Tensor,
    losses: Tensor,
    row_scale: Tensor,
    grad: Tensor,
    *,
    advantage: Tensor | None,
    importance_clip: float | None,
    temperature: float,
    student_head: Head,
    teacher_head: Head,
) -> None:
    """As `triton_rows.distill_rows` for `sampled_reverse_kl`, from the student's hidden states [k, H] and weight [V, H]
    and the teacher's raw logits [k, V]. `grad` [k, V] is E first."""
    bits = tuple(head.scale / temperature * LOG2_E for head in (student_head, teacher_head))
    token_ids = token_ids.contiguous()
    launch_references(hidden, weight, teacher, token_ids, room, bits)
    launch_product(hidden, weight, teacher, token_ids, grad, room, bits)
    finish(room, sampling_logprob, advantage, stats, losses, row_scale, importance_clip)
    put_target(room, grad, token_ids, row_scale, TILE.columns)


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
    room: Scratch,
    bits: tuple[float, float],
) -> None:
    """E and the partial sums of a chunk."""
    V, H = weight.shape
    columns = TILE.columns // PARTS
    blocks = (TILE.rows, TILE.inner), (TILE.columns, TILE.inner), *[(TILE.rows, columns)] * 2
    tensors = hidden, weight, teacher, e
    descriptors = [TensorDescriptor.from_tensor(t, list(block)) for t, block in zip(tensors, blocks, strict=True)]
    programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 3
    _product_kernel[(programs,)](
        *descriptors, token_ids, room.per_row, room.part, len(hidden), V, room.per_row.stride(0),
        *bits, *(-1e30 / unit for unit in bits), STEPS=triton.cdiv(H, TILE.inner),
        BM=TILE.rows, BN=TILE.columns, BK=TILE.inner, GROUP=16, PROGRAMS=programs, num_warps=TILE.warps,
        num_stages=TILE.stages,
    )  # fmt: skip
