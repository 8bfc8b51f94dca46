"""Uniform random numbers from a counter instead of a state: Philox 4x32-10 (Salmon et al., SC 2011).

The number of (seed, step, row) is always the same one, so a captured graph never repeats itself, a run can be
replayed from any step, and a row draws the same number whatever batch it is in. The Triton kernel computes the
same bits with `tl.philox`; this is the PyTorch form, in int64 because PyTorch has no unsigned 32-bit products.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def uniform(seed: int, step: int | Tensor, row_ids: Tensor) -> Tensor:
    """[R] float64 in (0, 1) for row_ids [R] int64; step is a number or an int64 tensor of one element."""
    step = torch.as_tensor(step, dtype=torch.int64, device=row_ids.device).reshape(()).expand_as(row_ids)
    c0, c1, c2, c3 = step & _MASK, step >> 32 & _MASK, row_ids & _MASK, row_ids >> 32 & _MASK
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0] & _MASK, k1 + _KEY_STEPS[1] & _MASK
    return (c0.double() + 0.5) * 2.0**-32


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2**32, without passing 2**63 on the way."""
    upper = (a >> 16) * b
    rest = (a & 0xFFFF) * b + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (rest >> 32), rest & _MASK
