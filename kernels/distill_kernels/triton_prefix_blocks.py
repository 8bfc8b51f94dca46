"""What the kernels of packed attention share: how much a program takes at once, which keys it goes over, how it loads.

`place` and `n` are positions in a row, counted from where a segment begins: its prompt's keys lie below 0.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class Blocks(NamedTuple):
    """Queries and keys that a program takes at once, its warps, and how many loads of its loop are under way."""

    queries: int
    keys: int
    warps: int
    stages: int


# By the largest head size that they are for: of the forward, the query and the key kernel, the fastest of those tried
# on an H200. Cards with less memory in a multiprocessor than an A100 take the second.
LARGE = {
    64: (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(128, 64, 4, 2)),
    128: (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 3)),
    256: (Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2)),
}
SMALL = {
    64: (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    128: (Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
    256: (Blocks(64, 32, 8, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
}
MEMORY = 160 * 1024  # bytes of a multiprocessor that a program of LARGE may need
SUMMED = 16  # keys of a program that adds parts


@functools.cache
def blocks(d: int, device: torch.device) -> tuple[Blocks, Blocks, Blocks]:
    """Of the forward, the query and the key kernel, for heads of size d."""
    large = device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= MEMORY
    return next(found for most, found in (LARGE if large else SMALL).items() if d <= most)


class Call(NamedTuple):
    """What all kernels of a call are launched with."""

    scale: float
    window: int | None
    softcap: float | None

    def numbers(self) -> tuple[float, float, int]:
        """What scores are multiplied with before and after a soft cap, in units of log 2, and the window."""
        if self.softcap is None:
            return self.scale * LOG2_E, 1.0, self.window or 0
        return self.scale / self.softcap, self.softcap * LOG2_E, self.window or 0

    def constants(self, query: Tensor, key: Tensor, value: Tensor) -> dict:
        d, dv, heads = query.shape[-1], value.shape[-1], query.shape[1]
        return {
            "GROUP": heads // key.shape[1],
            "D": d,
            "BLOCK_D": max(16, triton.next_power_of_2(d)),
            "DV": dv,
            "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
            "WINDOW": self.window is not None,
            "CAP": self.softcap is not None,
            "PRECISION": "ieee",
        }


def sizes(block: Blocks) -> dict[str, int]:
    """Of a launch."""
    return {"M": block.queries, "N": block.keys, "STAGES": block.stages, "num_warps": block.warps}


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


@triton.jit
def line_of(table, number):
    """The five numbers of a line of `PrefixLayout.tiles`, or of its `jobs` or `sums`."""
    line = table + number * 5
    return tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), tl.load(line + 4)


@triton.jit
def seen_keys(first, length, prompt_length, window, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr):
    """Where the positions begin that a tile's queries see, of the prompt's keys and of the own, and where these end."""
    prompt_first, own_first = -prompt_length, 0
    if WINDOW:
        prompt_first = tl.minimum(tl.maximum(prompt_first, first + 1 - window), 0)
        own_first = tl.maximum(first + 1 - window, 0) // N * N
    return prompt_first, own_first, tl.minimum(first + M, length)


@triton.jit
def seen_by(place, n, end, window, WINDOW: tl.constexpr):
    """Which keys at positions `n` the queries at `place` see."""
    seen = (n[None, :] <= place[:, None]) & (n < end)[None, :]
    if WINDOW:
        seen = seen & (n[None, :] > place[:, None] - window)
    return seen
