"""At equal samples, many prompts or many rollouts: a gradient's noise within prompts and between them.

With P prompts drawn at random and N rollouts of each, Var = between / P + within(N) / P. within(N) is the variance of a
group of N of one prompt (within(1) / N without a baseline), between that of the prompts' own expected gradients.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.variance.fixed import group_gradients, jackknife, target_of
from benchmarks.variance.pool import PromptPool
from benchmarks.variance.tables import Record
from distill.loss import LossOptions


def measure(
    pools: Sequence[PromptPool], estimators: dict[str, LossOptions], layouts: Sequence[tuple[int, int]]
) -> list[Record]:
    """A record for each estimator and layout (prompts, rollouts): both parts and their sum, over ‖E g‖²."""
    return [
        record
        for name, options in estimators.items()
        for record in _of_estimator(pools, name, options, target_of(name, options, estimators), layouts)
    ]


def _of_estimator(
    pools: Sequence[PromptPool], name: str, options: LossOptions, target: str, layouts: Sequence[tuple[int, int]]
) -> Iterator[Record]:
    # Estimators with one expectation differ within prompts only: the rest is from the least noisy of them.
    means = torch.stack([pool.sketches[target].mean(0) for pool in pools]).double()
    gram = means @ means.T  # [P, P]
    noise = torch.stack([pool.sketches[target].double().var(0).sum() / len(pool.reward) for pool in pools])
    for prompts, n in layouts:
        if options.baseline == "group" and n == 1:
            continue
        within = _within(pools, name, options, n)
        record: Record = {"estimator": name, "prompts_per_step": prompts, "num_rollouts": n}
        for part in ("within", "between", "total"):
            share = partial(_share, part, prompts=prompts, within=within, gram=gram, noise=noise)
            found = jackknife(len(pools), share, log=part != "between")
            record |= {f"{part}{suffix}": value for suffix, value in found.items()}
        yield record


def _within(pools: Sequence[PromptPool], name: str, options: LossOptions, n: int) -> Tensor:
    """[P] variance of the gradient of a group of n of one prompt; of smaller groups, scaled, where a pool is small."""
    count = len(pools[0].reward)
    size = min(n, count // 2)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(8 if size > 1 else 1):
        groups = torch.randperm(count, generator=generator)[: count // size * size].view(-1, size)
        found.append([group_gradients(pool, name, options, groups).double().var(0).sum() for pool in pools])
    return torch.tensor(found, dtype=torch.float64).mean(0) * size / n


def _share(part: str, kept: list[int], *, prompts: int, within: Tensor, gram: Tensor, noise: Tensor) -> float:
    """One part of the variance of a step over ‖E g‖², from the kept prompts."""
    inner, count = gram[kept][:, kept], len(kept)
    squared = (inner.sum() - inner.diagonal().sum()) / (count * (count - 1))
    spread = (inner.diagonal().sum() - inner.sum() / count) / (count - 1)
    parts = {"within": within[kept].mean(), "between": spread - noise[kept].mean()}
    parts["total"] = parts["within"] + parts["between"]
    return float(parts[part] / prompts / squared)
