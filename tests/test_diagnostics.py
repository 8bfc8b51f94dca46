"""The diagnostics of a step: against plain loops, and the noise estimate against gradients that are known."""

import math

import pytest
import torch
from conftest import tiny_model
from test_loss import make_rollouts, parts_of

from distill.loss import Group, LossOptions, accumulate_gradients, score
from distill.loss.gradients import token_weights
from distill.runtime import to_host
from distill.runtime.micro_batches import micro_batches
from distill.training.diagnostics import gradient_noise, step_metrics

LENGTHS = [3, 7, 1, 5]


def result_of(options=None, token_budget=10**6, lengths=LENGTHS, finished=None):
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    rollouts = make_rollouts(lengths, num_rollouts=2, vocab_size=97)
    group = Group.of(rollouts)
    if finished is not None:
        group = group._replace(finished=torch.tensor(finished))
    batches = micro_batches(group.prompt_mask.sum(1), group.completion_lengths, group.prompt_index, token_budget)
    own, other = parts_of(student), parts_of(teacher)
    options = options or LossOptions("reverse_kl")
    result = accumulate_gradients(own, [other], score([other], group, batches), group, batches, options)
    return result, group, options, student, teacher


def test_figures_of_a_step_against_plain_loops():
    result, group, options, student, teacher = result_of(finished=[True, False, True, False])
    found, rows = step_metrics(result, group, torch.tensor(2.5), options)
    by_row = result.stats.reverse_kl.split(LENGTHS)
    assert rows == pytest.approx([row.mean().item() for row in by_row], rel=1e-5)
    assert found["reverse_kl_end"] == pytest.approx((by_row[0][-1] + by_row[2][-1]).item() / 2, rel=1e-5)
    buckets = {0: [0], 1: [1, 2], 2: [3, 4, 5, 6]}
    for bucket, positions in buckets.items():
        values = [row[k] for row in by_row for k in positions if k < len(row)]
        assert found["reverse_kl_by_position"][bucket] == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
    assert len(found["reverse_kl_by_position"]) == 3
    assert found["reverse_kl_q99"] == result.stats.reverse_kl.max().item()
    assert found["truncated_fraction"] == 0.5
    assert math.isnan(found["reward_clipped_fraction"])
    assert found["grad_norm"] == 2.5
    same = []
    for row, length in enumerate(LENGTHS):
        ids = torch.cat([group.prompt_ids[row // 2], group.completion_ids[row, :length]])[None]
        place = slice(ids.shape[1] - length - 1, ids.shape[1] - 1)
        same.append(student(ids).logits[0, place].argmax(-1) == teacher(ids).logits[0, place].argmax(-1))
    assert found["top_token_agreement"] == pytest.approx(torch.cat(same).float().mean().item())


def test_no_completion_ended_and_rewards_clipped():
    options = LossOptions(reward_clip=0.5)
    result, group, options, *_ = result_of(options, finished=[False] * 4)
    found, _ = step_metrics(result, group, torch.tensor(0.0), options)
    assert math.isnan(found["reverse_kl_end"])
    assert found["reward_clipped_fraction"] == (result.stats.reward.abs() > 0.5).float().mean().item() > 0


@pytest.mark.parametrize("token_budget", [10**6, 12])
def test_row_gradients_are_those_of_a_shift_of_the_hidden_states(token_budget):
    result, *_ = result_of(token_budget=token_budget)
    parts = []
    for row, length in enumerate(LENGTHS):
        student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
        rollouts = make_rollouts(LENGTHS, num_rollouts=2, vocab_size=97)
        prompt = rollouts.prompt_ids[row // 2]
        ids = torch.cat([prompt, rollouts.completion_ids[row, :length]])[None]
        place = slice(len(prompt) - 1, ids.shape[1] - 1)
        shift = torch.zeros(32, requires_grad=True)
        hidden = student.base_model(ids).last_hidden_state[0, place].detach() + shift
        own = (hidden @ student.lm_head.weight.T).log_softmax(-1)
        other = teacher(ids).logits[0, place].log_softmax(-1).detach()
        loss = (own.exp() * (own - other)).sum(-1).mean() / len(LENGTHS)
        parts.append(torch.autograd.grad(loss, shift)[0])
    torch.testing.assert_close(result.row_gradients, torch.stack(parts), rtol=1e-3, atol=1e-5)


def test_noise_of_gradients_with_known_parts():
    """Many groups of drawn gradients: the three figures are right in the mean."""
    B, N, H, within, between = 4, 3, 50, 2.0, 0.7
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(H, generator=generator)
    group = Group.of(make_rollouts([2] * (B * N), num_rollouts=N, vocab_size=97))
    found = []
    for _ in range(400):
        prompts = signal + between * torch.randn(B, 1, H, generator=generator)
        rows = prompts + within * torch.randn(B, N, H, generator=generator)
        found.append(to_host(gradient_noise(rows.flatten(0, 1) / (B * N), group, LossOptions())))
    mean = {key: sum(f[key] for f in found) / len(found) for key in found[0]}
    assert mean["gradient_noise_within"] == pytest.approx(H * within**2 / (B * N), rel=0.03)
    assert mean["gradient_noise_between"] == pytest.approx(H * between**2 / B, rel=0.06)
    assert mean["gradient_signal"] == pytest.approx(signal.square().sum().item(), rel=0.03)


@pytest.mark.parametrize(("rollouts", "missing"), [(1, {"within", "between", "signal"}), (4, {"between"}), (2, set())])
def test_noise_that_one_prompt_or_rollout_cannot_show_is_absent(rollouts, missing):
    group = Group.of(make_rollouts([2] * 4, num_rollouts=rollouts, vocab_size=97))
    found = to_host(gradient_noise(torch.randn(4, 8), group, LossOptions()))
    assert {key.split("_")[-1] for key, value in found.items() if math.isnan(value)} == missing


def test_completions_cut_by_length_are_left_out_where_wanted():
    lengths, finished = torch.tensor([2, 4, 1]), torch.tensor([True, False, True])
    by_row = token_weights(lengths, "sequence", finished)
    torch.testing.assert_close(by_row, torch.tensor([0.25, 0.25, 0, 0, 0, 0, 0.5]))
    torch.testing.assert_close(token_weights(lengths, "token", finished), torch.tensor([1, 1, 0, 0, 0, 0, 1]) / 3)
    assert not token_weights(lengths, "sequence", ~finished | finished & False)[[0, 1, 6]].any()
    nothing = token_weights(lengths, "sequence", torch.zeros(3, dtype=torch.bool))
    assert not nothing.any()
    assert nothing.isfinite().all()


def test_a_masked_completion_has_no_gradient():
    masked, group, *_ = result_of(LossOptions("reverse_kl", mask_truncated=True), finished=[True, False, True, True])
    assert not masked.row_gradients[1].any()
    assert masked.row_gradients[0].any()
    assert len(masked.stats.reward) == sum(LENGTHS)
    noise = to_host(gradient_noise(masked.row_gradients, group, LossOptions(mask_truncated=True)))
    assert all(math.isnan(value) for value in noise.values())
