"""The algorithm: expectation, weights, micro-batches, masks. Every check is against plain PyTorch or by enumeration."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from distill.loss import Group, LossOptions, ModelParts, Rollouts, accumulate_gradients, score, statistics
from distill.loss.gradients import token_weights
from distill.models import split_head
from distill.prompts import left_pad
from distill.rollout import SamplingOptions, local_engine
from distill.runtime.micro_batches import micro_batches

ROOT = Path(__file__).parent.parent


def parts_of(model, dtype=torch.float32) -> ModelParts:
    return ModelParts(*split_head(model), dtype)


def make_rollouts(lengths, *, num_rollouts, vocab_size, prompt_lengths=None, seed=0, pad=0) -> Rollouts:
    """Random rollouts of given lengths; the log-probabilities at sampling are arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max(lengths)
    prompt_lengths = prompt_lengths or [4] * (rows // num_rollouts)
    prompts = [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in prompt_lengths]
    prompt_ids, prompt_mask = left_pad(prompts, pad)
    lengths = torch.tensor(lengths)
    ids = torch.randint(3, vocab_size, (rows, width), generator=generator)
    ids[torch.arange(width) >= lengths[:, None]] = pad
    logprob = -torch.rand(rows, width, generator=generator) * 3
    finished = torch.ones(rows, dtype=torch.bool)
    return Rollouts(prompt_ids, prompt_mask, ids, lengths, logprob, logprob, finished, num_rollouts)


def gradients(student, teacher, rollouts, options, token_budget=10**6, dtype=torch.float32):
    """Loss, statistics and all parameter gradients of one group."""
    student.zero_grad(set_to_none=True)
    group = Group.of(rollouts)
    batches = micro_batches(group.prompt_mask.sum(1), group.completion_lengths, group.prompt_index, token_budget)
    own, other = parts_of(student, dtype), parts_of(teacher, dtype)
    found = accumulate_gradients(own, [other], score([other], group, batches), group, batches, options)
    return found.loss, found.stats, {name: p.grad.clone() for name, p in student.named_parameters()}, len(batches)


def reference_loss(student, teacher, rollouts, options):
    """The group's loss in plain PyTorch: one padded forward a row, whole logits, autograd through everything."""
    rows = []
    for row, length in enumerate(rollouts.completion_lengths.tolist()):
        prompt = row // rollouts.num_rollouts
        ids = torch.cat(
            [rollouts.prompt_ids[prompt][rollouts.prompt_mask[prompt]], rollouts.completion_ids[row, :length]]
        )
        place = slice(len(ids) - length - 1, len(ids) - 1)
        own = student(ids[None]).logits[0, place].log_softmax(-1)
        other = teacher(ids[None]).logits[0, place].log_softmax(-1).detach()
        chosen = rollouts.completion_ids[row, :length, None]
        own_chosen = own.gather(1, chosen)[:, 0]
        if options.objective == "reverse_kl":
            rows.append((own.exp() * (own - other)).sum(-1))
        else:
            reward = (other.gather(1, chosen)[:, 0] - own_chosen).detach()
            ratio = torch.ones_like(reward)
            if options.importance_clip is not None:
                ratio = (own_chosen.detach() - rollouts.logprob[row, :length]).exp().clamp(max=options.importance_clip)
            rows.append(-ratio * reward * own_chosen)
    if options.reduction == "token":
        return torch.cat(rows).mean()
    return torch.stack([row.mean() for row in rows]).mean()


def test_expected_sampled_gradient_is_the_exact_one_by_enumeration():
    """A vocabulary of 5 in float64: every completion of one token, weighted by its probability."""
    student = tiny_model("llama", vocab_size=5, seed=1, dtype=torch.float64)
    teacher = tiny_model("llama", vocab_size=5, seed=2, dtype=torch.float64)
    rollouts = make_rollouts([1], num_rollouts=1, vocab_size=5)
    *_, exact, _ = gradients(student, teacher, rollouts, LossOptions("reverse_kl"), dtype=torch.float64)
    prompt = rollouts.prompt_ids[rollouts.prompt_mask]
    probabilities = student(prompt[None]).logits[0, -1].softmax(-1).detach()
    expected = {name: torch.zeros_like(value) for name, value in exact.items()}
    for token, probability in enumerate(probabilities):
        rollouts.completion_ids[0, 0] = token
        *_, sampled, _ = gradients(student, teacher, rollouts, LossOptions(), dtype=torch.float64)
        for name, value in sampled.items():
            expected[name] += probability * value
    largest = max(value.abs().max() for value in exact.values())
    assert largest > 1e-3
    for name, value in exact.items():
        # The models' own norms run in float32 inside, which bounds what can be expected here.
        torch.testing.assert_close(expected[name], value, rtol=1e-5, atol=1e-6 * largest.item())


@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_reverse_kl"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_loss_and_gradient_equal_plain_pytorch(family, objective, reduction, clip):
    student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
    rollouts = make_rollouts([3, 7, 1, 5], num_rollouts=2, vocab_size=97, prompt_lengths=[2, 6])
    options = LossOptions(objective, reduction, importance_clip=clip)
    loss, _, found, _ = gradients(student, teacher, rollouts, options)
    student.zero_grad(set_to_none=True)
    expected = reference_loss(student, teacher, rollouts, options)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        LossOptions(),
        LossOptions(reduction="token"),
        LossOptions(baseline="group", discount=0.5, reward_clip=2.0),
        LossOptions(baseline="exact", importance_clip=1.5),
        LossOptions("reverse_kl", mask_truncated=True),
    ],
    ids=lambda options: f"{options.objective}-{options.reduction}-{options.baseline}",
)
def test_splitting_a_group_does_not_change_its_gradient(family, options):
    # In float64, where what is left is the algorithm and not the order of additions.
    student, teacher = (tiny_model(family, seed=seed, dtype=torch.float64) for seed in (1, 2))
    rollouts = make_rollouts([3, 7, 1, 5, 2, 6], num_rollouts=3, vocab_size=97, prompt_lengths=[2, 6])
    rollouts.finished[3] = False
    dtype = torch.float64
    whole_loss, whole_stats, whole, count = gradients(student, teacher, rollouts, options, dtype=dtype)
    assert count == 1
    for budget in (30, 15, 1):
        loss, stats, split, count = gradients(student, teacher, rollouts, options, budget, dtype)
        assert count > 1
        torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-6)
        for found, expected in zip(stats, whole_stats, strict=True):  # in row order whatever the split
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("correction", ["none", "stale", "sampler"])
def test_the_ratio_is_to_what_the_configuration_names(correction):
    """Against the same loss in plain PyTorch, with the ratio's tensor in the place of the recorded one."""
    student, teacher = (tiny_model("llama", seed=seed, dtype=torch.float64) for seed in (1, 2))
    rollouts = make_rollouts([3, 7, 1, 5], num_rollouts=2, vocab_size=97)
    rollouts = replace(rollouts, sampling_logprob=rollouts.logprob.flip(0) - 0.3)
    options = LossOptions(importance_sampling=correction, importance_clip=3)
    _, _, found, _ = gradients(student, teacher, rollouts, options, dtype=torch.float64)
    named = {"none": rollouts, "stale": rollouts, "sampler": replace(rollouts, logprob=rollouts.sampling_logprob)}
    student.zero_grad(set_to_none=True)
    clip = None if correction == "none" else 3
    reference_loss(student, teacher, named[correction], LossOptions(importance_clip=clip)).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-6, msg=name)


def test_weights_sum_to_one_and_follow_the_reduction():
    lengths = torch.tensor([1, 3, 0, 2])
    by_row = token_weights(lengths, "sequence")
    torch.testing.assert_close(by_row, torch.tensor([1 / 3] + [1 / 9] * 3 + [1 / 6] * 2))
    torch.testing.assert_close(token_weights(lengths, "token"), torch.full((6,), 1 / 6))
    assert math.isclose(by_row.sum().item(), 1, rel_tol=1e-6)


@pytest.mark.parametrize("pad", [0, 2])  # 2 is the end-of-sequence token too
def test_the_sampled_end_counts_and_nothing_after_it(pad):
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    rollouts = make_rollouts([4, 2], num_rollouts=2, vocab_size=97, pad=pad)
    rollouts.completion_ids[1, 1] = 2  # ends here; what follows is padding
    loss, stats, found, _ = gradients(student, teacher, rollouts, LossOptions("reverse_kl"))
    assert len(stats.reward) == 6  # the end that was sampled is one of them
    rollouts.completion_ids[1, 2:] = 50
    same_loss, _, same, _ = gradients(student, teacher, rollouts, LossOptions("reverse_kl"))
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(found[name], same[name]) for name in found)
    rollouts.completion_ids[1, 1] = 50
    other_loss, *_ = gradients(student, teacher, rollouts, LossOptions())
    rollouts.completion_ids[1, 1] = 2
    ended_loss, *_ = gradients(student, teacher, rollouts, LossOptions())
    assert other_loss != ended_loss


@pytest.mark.parametrize(("prompt_lengths", "num_rollouts"), [([1], 1), ([1, 5], 1), ([1], 3)])
def test_one_rollout_and_prompts_of_one_token(prompt_lengths, num_rollouts):
    student, teacher = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    engine = local_engine(
        student,
        sampling=SamplingOptions(5),
        eos_token_ids=[2],
        pad_token_id=2,
        seed=0,
        precision="float32",
    )
    prompt_ids, mask = left_pad([[7] * n for n in prompt_lengths], 2)
    rollouts = engine.generate(
        prompt_ids, mask, num_rollouts=num_rollouts, prompt_keys=torch.arange(len(prompt_lengths))
    )
    loss, stats, found, _ = gradients(student, teacher, rollouts, LossOptions(importance_clip=2.0))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value).all() for value in found.values())
    # What was recorded at sampling is what scoring gives: the importance ratio of the first step is 1.
    recorded = rollouts.logprob[torch.arange(rollouts.logprob.shape[1]) < rollouts.completion_lengths[:, None]]
    torch.testing.assert_close(stats.student_logprob, recorded, rtol=0, atol=1e-4)


def test_statistics_agree_with_those_of_the_training_pass():
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    rollouts = make_rollouts([3, 7, 1, 5], num_rollouts=2, vocab_size=97)
    _, trained, _, _ = gradients(student, teacher, rollouts, LossOptions("reverse_kl"))
    group = Group.of(rollouts)
    batches = micro_batches(group.prompt_mask.sum(1), group.completion_lengths, group.prompt_index, 12)
    scored = statistics(parts_of(student), [parts_of(teacher)], group, batches)
    for found, expected in zip(scored, trained, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_head_wider_than_the_vocabulary_is_scored_on_the_shared_tokens_only():
    student, teacher = tiny_model("llama", vocab_size=101, seed=1), tiny_model("qwen3", vocab_size=99, seed=2)
    rollouts = make_rollouts([3, 2], num_rollouts=2, vocab_size=97)
    group = Group.of(rollouts)
    batches = micro_batches(group.prompt_mask.sum(1), group.completion_lengths, group.prompt_index, 100)
    stats = statistics(parts_of(student), [parts_of(teacher)], group, batches, vocab_size=97)
    ids = torch.cat([rollouts.prompt_ids[0], rollouts.completion_ids[0, :3]])
    own, other = (model(ids[None]).logits[0, 3:6, :97].log_softmax(-1) for model in (student, teacher))
    torch.testing.assert_close(stats.reverse_kl[:3], (own.exp() * (own - other)).sum(-1), rtol=1e-4, atol=1e-5)


STEP_IN_A_PROCESS_OF_ITS_OWN = """
import resource, sys
sys.path.insert(0, "tests")
from conftest import tiny_model
from test_loss import gradients, make_rollouts, parts_of
from distill.runtime.micro_batches import micro_batches
from distill.loss import Group, LossOptions, statistics

V = 32_768
student, teacher = (tiny_model("llama", vocab_size=V, seed=seed) for seed in (1, 2))

def everything(rows, length):
    rollouts = make_rollouts([length] * rows, num_rollouts=rows, vocab_size=V)
    for objective in ("reverse_kl", "sampled_reverse_kl"):
        gradients(student, teacher, rollouts, LossOptions(objective))
    group = Group.of(rollouts)
    parts = micro_batches(group.prompt_mask.sum(1), group.completion_lengths, group.prompt_index, 10**6)
    assert len(parts) == 1
    statistics(parts_of(student), [parts_of(teacher)], group, parts)

everything(2, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
everything(64, 64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_logits_of_a_whole_group_exist():
    """4,096 tokens on 32,768 words: one [K, V] in float32 is 512 MiB; scoring, loss and gradient stay below half."""
    command = [sys.executable, "-c", STEP_IN_A_PROCESS_OF_ITS_OWN]
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels"))
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 256 * 1024  # KiB
