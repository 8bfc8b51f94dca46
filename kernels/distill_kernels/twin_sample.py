"""Drawing tokens in PyTorch: what `triton_sample` does for CUDA, for logits on a CPU.

The filters need one threshold a row, not an order. For top-p it lies among the few likeliest columns of almost every
row a language model writes, so those are ranked first, and more of the vocabulary only for the rows that need it:
ranking 256 of 49,152 columns takes a twentieth of the time of all of them.
"""

import math

import torch
from torch import Tensor

from distill_kernels.counter import uniform

_BLOCK = 256  # columns whose sum the search for the drawn column skips at once
_SLICE_BYTES = 2 * 2**20  # of each [rows, V] buffer: small enough for the cache
_LIKELY = 256  # columns among which the end of the nucleus is looked for first


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
        z = x if temperature == 1 else x * (1 / temperature)
        mass = torch.exp(z, out=masses[:, :V])
        log_total = (mass if temperature == 1 else x.exp()).sum(-1).log()
        threshold = _threshold(z, mass, top_k, top_p, min_p)
        if threshold is not None:
            mass.masked_fill_(z < threshold[:, None], 0)
        chosen = _draw(masses, draws[part])[:, None]
        kept = masses.sum(-1, dtype=torch.float64).log() if threshold is not None else mass.sum(-1).log()
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
        left = z if not thresholds else z.masked_fill(z < thresholds[0][:, None], -math.inf)
        total = mass if not thresholds else left.exp()
        thresholds.append(_nucleus(left, total.sum(-1, dtype=torch.float64), top_p))
    if min_p > 0:
        thresholds.append(torch.full_like(z[:, 0], math.log(min_p)))
    return torch.stack(thresholds).amax(0) if thresholds else None


def _nucleus(z: Tensor, total: Tensor, top_p: float) -> Tensor:
    """[r] smallest value of z [r, V] that top-p keeps: exp(z) above it sums to less than top_p of total [r]."""
    V = z.shape[1]
    threshold, rows = z.new_zeros(len(z)), torch.arange(len(z))
    for count in (min(_LIKELY, V), max(1, V // 4), V):
        values, limit = z[rows].topk(count, dim=-1).values, (top_p * total[rows])[:, None]
        masses = values.double().exp()
        inside = masses.cumsum(-1) - masses < limit  # [rows, count], true up to the nucleus's end
        threshold[rows] = values.gather(1, inside.sum(-1, keepdim=True) - 1)[:, 0]
        rows = rows[inside[:, -1]]
        if not len(rows):
            break
    return threshold


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
