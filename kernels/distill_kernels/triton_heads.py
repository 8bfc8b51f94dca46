"""What every attention kernel does with the rows of a head, as Triton functions."""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, row_stride, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] at base + rows * row_stride, 0 for rows that are not there and past column D."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    return tl.load(base + rows[:, None] * row_stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, rows, row_stride, there, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes `values` [rows, BLOCK_D] where `load_rows` reads them, in the dtype of what is there."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    tl.store(base + rows[:, None] * row_stride + d[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def tanh(x):
    """Accurate to a rounding or two near 0 too, where 1 - 2 / (e^2x + 1) is only to a rounding of 1."""
    far = 1 - 2 / (tl.exp2(x * 2.8853900817779268) + 1)  # 2 log2 e; exact at both ends, at 0 and infinity
    s = x * x
    # The series up to x^11, of which less than 1e-8 is left at 1/4.
    near = s * (-0.3333333333333333 + s * (0.13333333333333333 + s * (-0.05396825396825397 + s * (
        0.021869488536155203 + s * -0.008863235529902197))))  # fmt: skip
    return tl.where(s < 0.0625, x + x * near, far)
