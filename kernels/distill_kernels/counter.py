"""Random numbers from a counter instead of a state, two layers of them.

A row has a 32-bit key and an odd multiplier: two words of Philox 4x32-10 (Salmon et al., SC 2011) of (seed, step, row
id). They are always the same ones, so a captured graph never repeats itself, a run can be replayed from any step, and
a row draws the same numbers whatever batch it is in. A column has a word of 31 bits, a hash of its row's two and its
number: three products and two exclusive ors with itself shifted, in int32 whose products wrap, so that PyTorch
computes it in place at the speed of its memory. `triton_sample` computes the same bits.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = torch.tensor(((0xD2511F53,), (0xCD9E8D57,)), device="cpu")
_KEY_STEPS = torch.tensor(((0x9E3779B9,), (0xBB67AE85,)), device="cpu") * torch.arange(10, device="cpu")[:, None, None]

SPREAD = 0x9E3779B1 - 2**32  # of the columns: the golden ratio's
MIX = 0x85EBCA6B - 2**32  # MurmurHash3's
WORD = 2.0**-31  # what a word counts in units of 1
LARGEST = 1 - 2.0**-24  # float32's last number before 1: no exponential is infinite


def row_keys(seed: int | Tensor, step: int | Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and odd multipliers [R, 1] int32 of row_ids [R] int64; seed and step are numbers or int64 tensors of one."""
    device = row_ids.device
    seed, step = (torch.as_tensor(number, device=device).reshape(1) for number in (seed, step))
    multipliers = _MULTIPLIERS.to(device)
    keys = torch.stack((seed, seed >> 32)) + _KEY_STEPS.to(device) & _MASK  # [10, 2, 1], a round's two each
    counter = torch.stack((step.expand_as(row_ids), row_ids))
    even, odd = counter & _MASK, counter >> 32  # [2, R]: words 0 and 2, words 1 and 3; odd ones are masked below
    for key in keys.unbind():
        product = (even * multipliers).flip(0)  # below 2**64: int64 holds its bits
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_MASK)
        odd = product
    key, multiplier = even[0].to(torch.int32), odd[0].to(torch.int32) | 1
    return key[:, None], multiplier[:, None]


def column_words(
    keys: tuple[Tensor, Tensor], columns: Tensor, *, out: Tensor | None = None, spare: Tensor | None = None
) -> Tensor:
    """Words 0 to 2**31 - 1, [R, C] int32, of rows' `keys` and int32 columns [C] or [R, C].

    `out` and `spare`, int32 [R, C], take the words and what is shifted on the way.
    """
    key, multiplier = keys
    words = torch.bitwise_xor(columns * SPREAD, key, out=out).mul_(multiplier)
    words.bitwise_xor_(torch.bitwise_right_shift(words, 16, out=spare)).mul_(MIX)
    return words.bitwise_xor_(torch.bitwise_right_shift(words, 15, out=spare))  # which clears the sign


def exponential(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard exponentials E = -log(1 - u) of words, with u = (word + 1/2) / 2**31 in float32.

    A small E has float32's relative precision and steps of 2**-31: an unlikely column wins by a small E only.
    """
    uniform = words.float().add_(0.5).mul_(WORD).clamp_(max=LARGEST)
    return uniform.to(dtype).neg_().log1p_().neg_()
