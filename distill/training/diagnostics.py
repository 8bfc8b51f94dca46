"""What a step's metrics line says about its gradient and its tokens, without another pass through a model.

Gradient noise is measured where it costs nothing: on v_r, the gradient of rollout r with respect to a shift of all its
last hidden states, H numbers that the backward pass leaves anyway. They are a slice of the whole gradient, so their
parts and ratios are to be compared between steps and settings, not their size. With R rollouts, N of each of B prompts,
u_r = R v_r and m_b a prompt's mean, the variance of the step's gradient (the mean of u) has the parts

    within  = mean_b var_r(u_r) / (B N)        between = var_b(m_b) / B − within

both summed over the H numbers and unbiased for prompts drawn at random; signal = ‖mean u‖² − within − between.
"""

import math

import torch
from torch import Tensor

from distill.loss import Group, GroupGradient, LossOptions
from distill.runtime import to_device, to_host

Metrics = dict[str, float | list[float | None]]


def step_metrics(
    result: GroupGradient, group: Group, grad_norm: Tensor, options: LossOptions
) -> tuple[Metrics, list[float]]:
    """The part of a metrics line that lives on the device, read in one copy, and each row's mean reverse KL.

    What a step cannot say is NaN, which is written as null.
    """
    stats, device = result.stats, result.loss.device
    lengths = to_device(group.completion_lengths, device)
    gap = (stats.student_logprob - group.valid(group.logprob, torch.arange(len(lengths)))).abs()
    if options.temperature != 1:  # then the loss's log-probabilities are others than the sampler's
        gap = torch.full_like(gap, torch.nan)
    clipped = gap * torch.nan if options.reward_clip is None else (stats.reward.abs() > options.reward_clip).float()
    found = to_host(
        {
            "loss": result.loss,
            "reverse_kl": -stats.reward.mean(),
            "reverse_kl_exact": stats.reverse_kl.mean(),
            "reverse_kl_q99": stats.reverse_kl.kthvalue(math.ceil(0.99 * len(stats.reverse_kl))).values,
            "reverse_kl_end": _at_ends(stats.reverse_kl, group),
            "reverse_kl_by_position": _by_position(stats.reverse_kl, group.completion_lengths),
            "student_entropy": stats.student_entropy.mean(),
            "teacher_entropy": stats.teacher_entropy.mean(),
            "top_token_agreement": result.agreement[0] / result.agreement[1],
            "sampler_logprob_gap": gap.mean(),
            "sampler_logprob_gap_max": gap.max(),
            "reward_clipped_fraction": clipped.mean(),
            "grad_norm": grad_norm,
            "truncated_fraction": 1 - to_device(group.finished, device).float().mean(),
            **gradient_noise(result.row_gradients, group, options),
            "row_reverse_kl": torch.segment_reduce(stats.reverse_kl, "mean", lengths=lengths, unsafe=True),
        }
    )
    tokens = int(group.completion_lengths.sum())
    found |= {"completion_tokens": tokens, "completion_length": tokens / len(lengths)}
    return found, found.pop("row_reverse_kl")


def gradient_noise(row_gradients: Tensor | None, group: Group, options: LossOptions) -> dict[str, Tensor]:
    """`gradient_noise_within`, `_between` and `gradient_signal`; all NaN with one rollout a prompt, and the second with
    one prompt, whose own squared gradient is then the signal.

    NaN too where prompts have different numbers of rollouts, or some completions are left out of the loss.
    """
    names = ("gradient_noise_within", "gradient_noise_between", "gradient_signal")
    count = group.prompt_index.bincount()
    left_out = options.mask_truncated and not group.finished.all()
    device, B, N = group.completion_ids.device, len(count), int(count[0])
    unknown = torch.full((), torch.nan, device=device)
    if row_gradients is None or left_out or N == 1 or (count != N).any():
        return dict.fromkeys(names, unknown)
    order = to_device(group.prompt_index.argsort(stable=True), device)
    u = row_gradients[order].view(B, N, -1) * (B * N)  # [B, N, H]
    within = u.var(1).sum(1).mean() / (B * N)
    between = u.mean(1).var(0).sum() / B - within if B > 1 else unknown
    signal = u.mean((0, 1)).square().sum() - within - between.nan_to_num(0)
    return dict(zip(names, (within, between, signal), strict=True))


def _at_ends(values: Tensor, group: Group) -> Tensor:
    """Mean over the end-of-sequence tokens; NaN where every completion was cut."""
    ends = (group.starts[1:] - 1)[group.finished]
    return values[to_device(ends, values.device)].mean()


def _by_position(values: Tensor, lengths: Tensor) -> Tensor:
    """Means over the positions 0, 1 to 2, 3 to 6, 7 to 14, ... of the completions."""
    position = torch.cat([torch.arange(length) for length in lengths.tolist()])
    bucket = (position + 1).log2().floor().long()
    sums = values.new_zeros(int(bucket.max()) + 1).index_add(0, to_device(bucket, values.device), values)
    return sums / to_device(bucket.bincount(), values.device)
