"""Drawing tokens in PyTorch: what `triton_sample` does for CUDA, for logits on a CPU.

The filters need one threshold a row, not an order. For top-p it lies among the few likeliest columns of almost every
row a language model writes, so those are ranked first, and more of the vocabulary only for the rows that need it:
ranking 256 of 49,152 columns takes a twentieth of the time of all of them.

The race needs few logarithms. E = -log(1 - u) is larger than u, so mass / u bounds the score mass / E of a column.
Blocks of columns are ranked by their largest bound; scores are computed in the first few blocks, and in all of them
only for a row (one in a thousand, or fewer) whose best score does not pass the bound of the last of those.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distill_kernels.counter import WORD, column_words, exponential, row_keys

_SLICE_BYTES = 2 * 2**20  # of each [rows, V] buffer: small enough for the cache
_LIKELY = 256  # columns among which the end of the nucleus is looked for first
_BLOCK = 128  # columns that share a bound
_LIKELY_BLOCKS = 4  # blocks among which the winner of a race is looked for first


def sample_rows(
    logits: Tensor,
    row_ids: Tensor,
    step: Tensor,
    seed: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    """Writes token_ids [R] and logprobs [2, R] (plain softmax, sampling distribution) for logits [R, V]."""
    R, V = logits.shape
    if R == 0:
        return
    filtered = 0 < top_k < V or top_p < 1 or min_p > 0
    keys = row_keys(seed, step, row_ids)
    columns = torch.arange(V, dtype=torch.int32)
    peaks, thresholds = torch.empty(R, 1), torch.full((R, 1), -math.inf)
    totals, kept = torch.empty(R), torch.empty(R)  # of e^(logit - peak) and of the masses
    bounds = torch.empty(R, -(-V // _BLOCK))  # of the scores in each block, times WORD
    parts = list(_parts(R, V))
    first, second = torch.empty(2, parts[0].stop, V)
    padded = torch.zeros(parts[0].stop, bounds.shape[1] * _BLOCK)
    for part in parts:
        x = logits[part].float()
        shifted, mass, ratio = first[: len(x)], second[: len(x)], padded[: len(x), :V]
        torch.sub(x, torch.amax(x, -1, keepdim=True, out=peaks[part]), out=shifted)
        torch.sum(_exp(shifted, 1, mass), -1, out=totals[part])
        if temperature != 1:
            torch.sum(_exp(shifted, temperature, mass), -1, out=kept[part])
        else:
            kept[part] = totals[part]
        if filtered:
            z = shifted if temperature == 1 else shifted.mul_(1 / temperature)
            thresholds[part, 0] = _threshold(z, mass, top_k, top_p, min_p)
            kept[part] = mass.masked_fill_(z < thresholds[part], 0).sum(-1, dtype=torch.float64)
        key, multiplier = keys[0][part], keys[1][part]
        words = column_words((key, multiplier), columns, out=shifted.view(torch.int32), spare=ratio.view(torch.int32))
        torch.div(mass, ratio.copy_(words), out=ratio)
        torch.amax(padded[: len(x)].view(len(x), -1, _BLOCK), -1, out=bounds[part])
    chosen = _race((logits, peaks, thresholds, *keys, bounds), temperature)
    shifted = (logits.gather(1, chosen).float() - peaks)[:, 0]
    token_ids.copy_(chosen[:, 0])
    torch.sub(shifted, totals.log(), out=logprobs[0])
    torch.sub(shifted * (1 / temperature), kept.log(), out=logprobs[1])


def _exp(shifted: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """e^(shifted / temperature); exp2 takes a third of exp's time in PyTorch."""
    return torch.mul(shifted, math.log2(math.e) / temperature, out=out).exp2_()


def _race(rows: tuple[Tensor, ...], temperature: float) -> Tensor:
    """[R, 1] columns of the largest scores; `rows` are the first arguments of `_winners`, of all rows."""
    R, blocks = rows[-1].shape
    chosen, passed = torch.empty(R, 1, dtype=torch.int64), torch.empty(R, 1, dtype=torch.bool)
    few = min(_LIKELY_BLOCKS, blocks)
    for part in _parts(R, few * _BLOCK):
        chosen[part], passed[part] = _winners(*(tensor[part] for tensor in rows), few, temperature)
    if few < blocks and not passed.all():
        left = passed.logical_not_()[:, 0].nonzero()[:, 0]
        for part in _parts(len(left), blocks * _BLOCK):
            again = left[part]
            chosen[again], _ = _winners(*(tensor[again] for tensor in rows), blocks, temperature)
    return chosen


def _winners(
    logits: Tensor,
    peaks: Tensor,
    thresholds: Tensor,
    key: Tensor,
    multiplier: Tensor,
    bounds: Tensor,
    count: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """[r, 1] columns of the best scores in the `count` blocks of the largest bounds; whether they pass all others."""
    limits, blocks = bounds.topk(count, dim=-1)
    columns = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK)).flatten(1).clamp_(max=logits.shape[1] - 1)
    shifted = logits.gather(1, columns).float() - peaks
    mass = _exp(shifted, temperature).masked_fill_(shifted * (1 / temperature) < thresholds, 0)
    words = column_words((key, multiplier), columns.int())
    best, at = mass.div_(exponential(words)).max(-1, keepdim=True)
    return columns.gather(1, at), best * WORD > limits[:, -1:]


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """Slices of so many rows whose buffers of so many columns fit the cache."""
    height = max(1, _SLICE_BYTES // (4 * columns))
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _threshold(z: Tensor, mass: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """[r] smallest z that every filter keeps."""
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
    return torch.stack(thresholds).amax(0)


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
