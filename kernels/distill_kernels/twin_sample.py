"""Drawing tokens in PyTorch: what `triton_sample` does for CUDA, for logits on a CPU.

The filters need one threshold a row, not an order: a column stays while the mass (top-p) or the number (top-k) of
the columns above it is below the limit, which a bisection over the logits' range finds in some twenty passes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill_kernels.counter import uniform

_BLOCK = 256  # columns whose sum the search for the drawn column skips at once
_SLICE_BYTES = 2 * 2**20  # of each [rows, V] buffer: small enough for the cache
_COARSE_STEPS = 12


def sample_rows(
    logits: Tensor,
    row_ids: Tensor,
    step: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    *,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    """Writes token_ids [R] and logprobs [2, R] (plain softmax, sampling distribution) for logits [R, V]."""
    R, V = logits.shape
    draws = uniform(seed, step, row_ids)
    rows = max(1, _SLICE_BYTES // (4 * V))
    padded = torch.zeros(min(rows, R), -(-V // _BLOCK) * _BLOCK)
    for start in range(0, R, rows):
        part = slice(start, min(start + rows, R))
        masses = padded[: part.stop - part.start]
        x = logits[part].float()
        x = x - x.amax(-1, keepdim=True)  # [r, V], the largest is 0
        z = x * (1 / temperature)
        mass = torch.exp(z, out=masses[:, :V])
        log_total = (mass if temperature == 1 else x.exp()).sum(-1).log()
        threshold = _threshold(z, mass, top_k, top_p, min_p)
        if threshold is not None:
            mass.masked_fill_(z < threshold[:, None], 0)
        chosen = _draw(masses, draws[part])[:, None]
        kept = masses.double().sum(-1).log() if threshold is not None else mass.sum(-1).log()
        token_ids[part] = chosen[:, 0]
        logprobs[0, part] = x.gather(1, chosen)[:, 0] - log_total
        logprobs[1, part] = z.gather(1, chosen)[:, 0] - kept


def _threshold(z: Tensor, mass: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """[r] smallest shifted logit that every filter keeps; None without a filter."""
    V = z.shape[1]
    thresholds = []
    if 0 < top_k < V:
        thresholds.append(z.topk(top_k, dim=-1).values[:, -1])
    if top_p < 1:
        kept = mass if not thresholds else mass.masked_fill(z < thresholds[0][:, None], 0)
        total = kept.sum(-1)
        # Columns of mass <= (1 - top_p) total / V sum to less than 1 - top_p: none of them is in the nucleus.
        lowest = (total * ((1 - top_p) / V)).log()
        thresholds.append(_bisect(z, lowest, lambda middle: (kept * (z > middle)).sum(-1) < top_p * total))
    if min_p > 0:
        thresholds.append(torch.full_like(z[:, 0], math.log(min_p)))
    return torch.stack(thresholds).amax(0) if thresholds else None


def _bisect(z: Tensor, low: Tensor, keeps: Callable[[Tensor], Tensor]) -> Tensor:
    """[r] smallest value of z [r, V] above `low` for which `keeps` holds; it holds for the largest, 0, and stops
    holding once on the way down. `keeps` judges the values at or below its argument [r, 1].

    A few halvings first, which cost one sum each; then steps that move to a value that occurs, until none is left
    between the two ends.
    """
    high = torch.zeros_like(low)
    for _ in range(_COARSE_STEPS):
        middle = (low + high) / 2
        kept = keeps(middle[:, None])
        high, low = torch.where(kept, middle, high), torch.where(kept, low, middle)
    nearest = _largest_up_to(z, high)
    high = torch.where(nearest > low, nearest, torch.zeros_like(high))
    while True:
        middle = (low + high) / 2
        active = (middle > low) & (middle < high)
        if not active.any():
            return high
        below = _largest_up_to(z, middle)
        kept = keeps(middle[:, None]) & (below > low)
        above = z.masked_fill(z <= middle[:, None], math.inf).amin(-1)
        high = torch.where(active & kept, below, high)
        low = torch.where(active & ~kept, torch.where(above == high, high, middle), low)


def _largest_up_to(z: Tensor, limit: Tensor) -> Tensor:
    """[r] largest value of z [r, V] that is at most limit [r]."""
    return z.masked_fill(z > limit[:, None], -math.inf).amax(-1)


def _draw(masses: Tensor, draws: Tensor) -> Tensor:
    """[r] first column at which the cumulative mass [r, n * _BLOCK] passes draws [r] times the total."""
    blocks = masses.view(masses.shape[0], -1, _BLOCK)
    cumulative = blocks.sum(-1).double().cumsum(-1)  # [r, n]
    target = draws * cumulative[:, -1]
    block = (cumulative <= target[:, None]).sum(-1).clamp(max=blocks.shape[1] - 1)
    rows = torch.arange(masses.shape[0])
    inside = blocks[rows, block]  # [r, _BLOCK]
    before = cumulative[rows, block] - inside.sum(-1)
    passed = (inside.double().cumsum(-1) > (target - before)[:, None]) & (inside > 0)
    # Rounding may leave the target at or past the block's last mass: then the last column with mass is drawn.
    last = (inside > 0).int().mul(torch.arange(_BLOCK)).amax(-1)
    first = torch.where(passed.any(-1), passed.int().argmax(-1), last)
    return block * _BLOCK + first
