"""What a sampled token is credited with: the advantage A in the loss −ρ·A·log p(y) of `sampled_reverse_kl`.

With r_k = log q(y_k) − log p(y_k) the reward of position k of a rollout of T tokens, KL_k the exact reverse KL there
(so that E[r_k] = −KL_k given the state), and γ = `discount`:

    none    A_k = Σ_{j≥0} γ^j r_{k+j}
    group   A_k = Σ_{j≥0} γ^j r_{k+j} − b·h_k; b the mean of the prompt's other rollouts' mean token rewards, h_k the
            mean of Σ_{j<T'−k} γ^j over those of them, of T' tokens, that reach position k (1 if γ = 0 or none does)
    exact   A_k = (r_k + KL_k) − Σ_{j≥1} γ^j KL_{k+j}

What is subtracted never depends on y_k, and `exact` puts E[r_{k+j}] for r_{k+j}, so all three have one expectation.
"""

import torch
from torch import Tensor

from distill.loss.group import Group
from distill.loss.options import LossOptions
from distill.runtime import to_device
from distill_kernels import TokenStats


def needs_scores(options: LossOptions) -> bool:
    """Whether A is more than a token's own reward, which the fused loss knows by itself."""
    changed = options.baseline != "none" or options.discount > 0 or options.reward_clip is not None
    return options.objective == "sampled_reverse_kl" and changed


def clipped(reward: Tensor, options: LossOptions) -> Tensor:
    """Rewards within `reward_clip`; of a mixture of teachers, the reward of each."""
    return reward if options.reward_clip is None else reward.clamp(-options.reward_clip, options.reward_clip)


def advantages(stats: TokenStats, completion_lengths: Tensor, prompt_index: Tensor, options: LossOptions) -> Tensor:
    """A [K] of a group's K tokens, row 0's first, from their statistics; lengths and index [R] are on the host.

    A reward that is not finite stays what it is and counts as 0 for every other token.
    """
    reward = clipped(stats.reward, options)
    finite = reward.isfinite()
    known = torch.where(finite, reward, 0)
    kl = stats.reverse_kl.masked_fill(~stats.reverse_kl.isfinite(), 0)
    if options.baseline == "exact":
        advantage = known + 2 * kl - _returns(kl, completion_lengths, options.discount)
    else:
        advantage = _returns(known, completion_lengths, options.discount)
        if options.baseline == "group":
            advantage = advantage - _leave_one_out(known, completion_lengths, prompt_index, options.discount)
    return torch.where(finite, advantage, reward)


def task_credit(group: Group, weights: Tensor) -> Tensor:
    """[K] on the host: what a task adds to each token's advantage, for tokens that weigh `weights` [K].

    The weight of each is taken out again, so that the loss has −A_r log p(y) of rollout r's whole completion, a mean
    over the rollouts that count: its gradient is that of the mean reward, with the sign of a loss, whatever `reduction`
    is. With a mean over tokens long completions would be moved less than short ones.
    """
    shares = torch.segment_reduce(weights, "sum", lengths=group.completion_lengths, initial=0)
    of_token = (group.task_advantage / (shares > 0).sum().clamp(min=1)).repeat_interleave(group.completion_lengths)
    return torch.where(weights > 0, of_token / weights, 0)


def _returns(values: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """[K] sums over the rest of each row, discounted by position."""
    if discount == 0:
        return values
    valid = _valid(lengths)
    index = to_device(valid.flatten().nonzero()[:, 0], values.device)
    padded = values.new_zeros(valid.numel()).index_copy(0, index, values).view(valid.shape)
    columns = list(padded.unbind(1))
    for k in reversed(range(len(columns) - 1)):
        columns[k] = columns[k] + discount * columns[k + 1]
    return torch.stack(columns, 1).flatten()[index]


def _leave_one_out(reward: Tensor, lengths: Tensor, prompt_index: Tensor, discount: float) -> Tensor:
    """[K] baselines b·h from the other rollouts of each row's prompt; 0 where there is no other."""
    device, same = reward.device, prompt_index[:, None] == prompt_index
    others = (same & ~torch.eye(len(lengths), dtype=torch.bool)).to(reward.dtype)  # [R, R]
    share = to_device(others / others.sum(1, keepdim=True).clamp(min=1), device)
    # Lengths that are checked would be waited for.
    of_row = torch.segment_reduce(reward, "mean", lengths=to_device(lengths, device), initial=0, unsafe=True)
    baseline = share @ of_row  # [R]
    row = to_device(torch.arange(len(lengths)).repeat_interleave(lengths), device)
    if discount == 0:
        return baseline[row]
    valid = _valid(lengths)
    rest = (lengths[:, None] - torch.arange(valid.shape[1])).clamp(min=0).to(reward.dtype)  # [R, T]
    horizon = rest if discount == 1 else (1 - discount**rest) / (1 - discount)
    reached = others @ valid.to(reward.dtype)
    level = torch.where(reached > 0, others @ horizon / reached.clamp(min=1), 1.0)
    return baseline[row] * to_device(level[valid], device)


def _valid(lengths: Tensor) -> Tensor:
    """[R, T] bool on the host, true where a row has a token."""
    return torch.arange(int(lengths.max())) < lengths[:, None]
