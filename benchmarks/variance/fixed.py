"""Noise of a group's KL and gradient at a fixed policy, for every estimator and number of rollouts, from pools.

Groups are disjoint parts of a prompt's pool. Per prompt, the variance of a group's gradient is that between the groups'
gradients; sums over prompts are divided by sums over prompts, and intervals are a jackknife's over prompts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.variance.figures import T_95
from benchmarks.variance.pool import SCORE, PromptPool, vector_name
from benchmarks.variance.tables import Record
from distill.loss import LossOptions

PARTITIONS = 32  # random ways to cut a pool into groups


def group_gradients(
    pool: PromptPool, name: str, options: LossOptions, groups: Tensor, kind: str = "sketches"
) -> Tensor:
    """Sketches [J, D], or "shifts" [J, H], of the gradients of groups of rollouts, indices [J, N] into the pool."""
    vectors = getattr(pool, kind)
    if options.baseline != "group":
        return vectors[vector_name(name, options)][groups].mean(1)
    reward, n = pool.reward[groups], groups.shape[1]
    others = (reward.sum(1, keepdim=True) - reward) / max(1, n - 1)
    plain, score = vectors["plain"][groups], vectors[SCORE][groups]
    return plain.mean(1) - (others[..., None] * score).mean(1)


def squared_mean(vectors: Tensor) -> Tensor:
    """An unbiased estimate of the squared norm of the expectation of independent vectors [M, D]."""
    m, vectors = len(vectors), vectors.double()
    return (vectors.sum(0).square().sum() - vectors.square().sum()) / (m * (m - 1))


def noise(pool: PromptPool, name: str, options: LossOptions, target: str, n: int) -> dict[str, float]:
    """Of one prompt: variance of a group of n, squared norm of the expected gradient (both of the shift's too), mean
    cosine, variances of the KL."""
    count = len(pool.reward)
    generator = torch.Generator().manual_seed(0)
    reference = pool.sketches[target]
    expected = squared_mean(reference).clamp(min=0).sqrt()
    variance, shift_variance, cosine, kl, kl_exact = [], [], [], [], []
    for _ in range(PARTITIONS if n > 1 else 1):
        groups = torch.randperm(count, generator=generator)[: count // n * n].view(-1, n)
        found = group_gradients(pool, name, options, groups)
        variance.append(found.double().var(0).sum())
        shift_variance.append(group_gradients(pool, name, options, groups, "shifts").double().var(0).sum())
        # The reference leaves out the group's own rollouts, with which its noise is shared.
        rest = (reference.sum(0) - reference[groups].sum(1)) / (count - n)
        cosine.append(((found * rest).sum(1) / (found.norm(dim=1) * expected)).mean())
        kl.append(pool.reward[groups].mean(1).var())
        kl_exact.append(pool.reverse_kl[groups].mean(1).var())
    lists = {"variance": variance, "shift_variance": shift_variance, "cosine": cosine}
    lists |= {"kl_variance": kl, "kl_exact_variance": kl_exact}
    found = {key: float(torch.stack(values).double().mean()) for key, values in lists.items()}
    of_shift = float(squared_mean(pool.shifts[target]))
    return found | {"squared_norm": float(squared_mean(reference)), "shift_squared_norm": of_shift, "one": 1.0}


def target_of(name: str, options: LossOptions, estimators: dict[str, LossOptions]) -> str:
    """The stored gradient whose mean is this estimator's expectation, with the least noise."""
    same = options.objective == "sampled_reverse_kl" and not options.discount and options.reward_clip is None
    if same:
        exact = [other for other, its in estimators.items() if its.objective == "reverse_kl"]
        if exact:
            return exact[0]
    return "plain" if options.baseline == "group" else vector_name(name, options)


def measure(pools: Sequence[PromptPool], estimators: dict[str, LossOptions], ns: Sequence[int]) -> list[Record]:
    """A record for each estimator and N of which the pools hold two groups; a group baseline needs two rollouts."""
    records = []
    for name, options in estimators.items():
        target = target_of(name, options, estimators)
        for n in ns:
            if len(pools[0].reward) < 2 * n or (options.baseline == "group" and n < 2):
                continue
            prompts = [noise(pool, name, options, target, n) for pool in pools]
            record: Record = {"estimator": name, "num_rollouts": n, "prompts": len(pools)}
            record |= {f"relative_variance{k}": v for k, v in ratio(prompts, "variance", "squared_norm").items()}
            shift = ratio(prompts, "shift_variance", "shift_squared_norm")
            record |= {f"shift_relative_variance{k}": v for k, v in shift.items()}
            record |= {f"cosine{k}": v for k, v in ratio(prompts, "cosine", "one", log=False).items()}
            for key in ("kl", "kl_exact"):
                spread = ratio(prompts, f"{key}_variance", "one")
                record |= {f"{key}_sd{k}": math.sqrt(v) for k, v in spread.items()}
            records.append(record | {"per_prompt": prompts})
    return records


def ratio(rows: Sequence[dict[str, float]], over: str, under: str, log: bool = True) -> dict[str, float]:
    """Sum of one figure over sum of another, with the jackknife's interval over rows: keys "", "_low" and "_high"."""
    return jackknife(len(rows), lambda kept: sum(rows[i][over] for i in kept) / sum(rows[i][under] for i in kept), log)


def jackknife(count: int, figure: Callable[[list[int]], float], log: bool = True) -> dict[str, float]:
    """A figure of all units and its 95 % interval from leaving out one unit at a time, on a log scale if wanted."""
    everything = list(range(count))
    whole = figure(everything)
    found: dict[str, Any] = {"": whole, "_low": math.nan, "_high": math.nan}
    if count < 2:
        return found
    parts = [figure(everything[:i] + everything[i + 1 :]) for i in everything]
    if log and min(whole, *parts) <= 0:
        return found
    scaled = [math.log(part) if log else part for part in parts]
    centre = sum(scaled) / count
    error = math.sqrt((count - 1) / count * sum((part - centre) ** 2 for part in scaled))
    half = T_95[max(df for df in T_95 if df <= count - 1)] * error
    low, high = (math.log(whole) - half, math.log(whole) + half) if log else (whole - half, whole + half)
    return found | {"_low": math.exp(low) if log else low, "_high": math.exp(high) if log else high}


def against(records: Sequence[Record], one: tuple[str, int], other: tuple[str, int]) -> dict[str, float] | None:
    """The ratio of two variances of the gradient, each an (estimator, N), with its interval; None if one is missing."""
    by_cell = {(record["estimator"], record["num_rollouts"]): record["per_prompt"] for record in records}
    if one not in by_cell or other not in by_cell:
        return None
    pairs = zip(by_cell[one], by_cell[other], strict=True)
    return ratio([{"one": a["variance"], "other": b["variance"]} for a, b in pairs], "one", "other")


def sketch_error(pools: Sequence[PromptPool]) -> float:
    """Root mean square of the relative error of a sketch's squared norm against the full gradient's."""
    errors = [
        (pool.sketches[name].double().square().sum(1) / pool.norms[name] - 1) for pool in pools for name in pool.norms
    ]
    return float(torch.cat(errors).square().mean().sqrt())
