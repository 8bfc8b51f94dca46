"""The merge of two attentions over different keys in Triton: what `twin_merge` does for a CPU, in one pass.

A program takes several tokens of one head. Bytes: two reads and a write of [M, h, d] and of the log-sum-exps [M, h],
which is 6.1 an element of half precision where d is 128. Loads are of 16 bytes where 16 divides d.
"""

import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_math import FUSION, offset_of

ELEMENTS = 4096  # of the output that a program holds: a thread has four loads of each part under way
WARPS = 4


@triton.jit
def _share_and_sum(own, other):
    """sigmoid(other - own) and log(e^own + e^other), of infinities too what PyTorch makes of them."""
    share = 1 / (1 + tl.exp(own - other))
    distance = tl.where(own == other, 0.0, tl.abs(own - other))  # two equal infinities have no difference
    return share, tl.maximum(own, other) + tl.log(1 + tl.exp(-distance))


@triton.jit(
    do_not_specialize=["lse_stride", "other_lse_stride", "M"], do_not_specialize_on_alignment=["lse", "other_lse"]
)  # a head's log-sum-exps are as many as there are tokens
def _merge_kernel(
    out, lse, other_out, other_lse, out_row_stride, out_head_stride, other_row_stride, other_head_stride,
    lse_step, lse_stride, other_lse_step, other_lse_stride, M,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    row = tl.program_id(0) // HEADS * ROWS + tl.arange(0, ROWS)
    there = row < M
    lse += offset_of(head, lse_stride) + offset_of(row, lse_step)
    other_lse += offset_of(head, other_lse_stride) + offset_of(row, other_lse_step)
    own_lse = tl.load(lse, mask=there, other=0.0)
    share, merged_lse = _share_and_sum(own_lse, tl.load(other_lse, mask=there, other=0.0))

    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    out += offset_of(head, out_head_stride) + offset_of(row, out_row_stride)[:, None] + d[None, :]
    other_out += offset_of(head, other_head_stride) + offset_of(row, other_row_stride)[:, None] + d[None, :]
    own = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(other_out, mask=mask, other=0.0).to(tl.float32)
    share = share[:, None]
    # From the nearer end, as torch.lerp goes: with a share of 1 the other part is kept to its last digit.
    merged = tl.where(share < 0.5, own + share * (other - own), other - (1 - share) * (other - own))

    tl.debug_barrier()  # several threads read a log-sum-exp, and one of them writes it
    tl.store(lse, merged_lse, mask=there)
    tl.store(out, merged.to(out.dtype.element_ty), mask=mask)


def blocks(d: int) -> dict[str, int]:
    """What a program holds, for heads of size d."""
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_D": block_d, "ROWS": max(1, ELEMENTS // block_d)}


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """In place; `out` and `other_out` [M, h, d] with a last stride of 1, `lse` and `other_lse` [M, h] float32."""
    M, h, d = out.shape
    if M == 0:
        return
    size = blocks(d)
    strides = (*out.stride()[:2], *other_out.stride()[:2], *lse.stride(), *other_lse.stride())
    _merge_kernel[(triton.cdiv(M, size["ROWS"]) * h,)](
        out, lse, other_out, other_lse, *strides, M, HEADS=h, D=d, **size, num_warps=WARPS, **FUSION
    )
