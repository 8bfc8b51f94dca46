"""Rewards beside the teacher: the gradient by enumeration, and what a run does with good and bad reward functions."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from test_advantage import STUDENT, TEACHER, V, assert_equal, completions, logprobs, states_of
from test_loss import gradients, make_rollouts, reference_loss
from test_train import assert_same_run, events_of, execute, metrics_of, weights_of

from distill.config import ConfigError, load_config
from distill.loss import Group, LossOptions
from distill.loss.advantage import advantages, needs_scores, task_credit
from distill.loss.gradients import token_weights
from distill.run import CheckpointError
from distill.runtime import read_json_lines
from distill.train import main
from distill.training.rewards import task_advantages
from distill_kernels import reference

WEIGHTS = torch.tensor([1.3, -0.4], dtype=torch.float64)


def rewards_of(ids: tuple[int, ...]) -> list[float]:
    """Two tasks; both look at the whole completion."""
    return [float(ids[-1] == 0), sum(ids) / (2 + len(ids))]


def group_of(completions_of_prompt: list[tuple[int, ...]], scale: bool) -> Group:
    """One prompt's rollouts with the advantages of their rewards."""
    rewards = torch.tensor([rewards_of(ids) for ids in completions_of_prompt], dtype=torch.float64)
    index = torch.zeros(len(rewards), dtype=torch.int64)
    lengths = torch.tensor([len(ids) for ids in completions_of_prompt])
    nothing = torch.zeros(len(rewards), 1)
    advantage = task_advantages(rewards, WEIGHTS, index, scale=scale).double()
    return Group(nothing, nothing, nothing, lengths, index, nothing, task_advantage=advantage)


def expected_gradient(options: LossOptions, reduction: str, length: int, rollouts: int, *, tasks: bool, scale=False):
    """Mean gradient [V, V + 1] over every group of completions: the gradient of the sum of all groups' losses, each
    weighted by the group's probability."""
    said = list(itertools.product(completions(length, ends=True), repeat=rollouts))
    rows = [ids for group in said for ids in group]
    weights, credit = [], []
    for of_group in said:
        group = group_of(list(of_group), scale)
        weights.append(token_weights(group.completion_lengths, reduction).double())
        credit.append(task_credit(group, weights[-1]))
        weights[-1] *= math.exp(sum(logprobs(STUDENT, ids).sum().item() for ids in of_group))
    table, lengths = STUDENT.clone().requires_grad_(), torch.tensor([len(ids) for ids in rows])
    hidden = torch.eye(V + 1, dtype=torch.float64)[[state for ids in rows for state in states_of(ids)]]
    inputs = hidden, table, hidden, TEACHER, torch.tensor([token for ids in rows for token in ids])
    given, alone = {}, options.objective == "rewards"
    if needs_scores(options):
        index = torch.arange(len(said)).repeat_interleave(rollouts)
        given["advantage"] = advantages(reference.linear_reverse_kl(*inputs), lengths, index, options)
    if tasks:
        given["advantage" if alone else "task_advantage"] = torch.cat(credit)
    objective = "sampled_reverse_kl" if alone else options.objective
    loss, _ = reference.linear_distill_loss(*inputs, torch.cat(weights), objective=objective, **given)
    return torch.autograd.grad(loss, table)[0]


def gradient_of_the_mean_reward(length: int) -> torch.Tensor:
    table = STUDENT.clone().requires_grad_()
    mean = sum(
        logprobs(table, ids).sum().exp() * float(torch.tensor(rewards_of(ids), dtype=torch.float64) @ WEIGHTS)
        for ids in completions(length, ends=True)
    )
    return torch.autograd.grad(mean, table)[0]


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize(
    "options",
    [
        LossOptions(),
        LossOptions(baseline="group", discount=0.5),
        LossOptions("reverse_kl"),
        LossOptions("forward_kl"),
        LossOptions("jsd"),
        LossOptions("rewards"),
    ],
    ids=lambda options: f"{options.objective}-{options.baseline}",
)
def test_a_reward_adds_the_gradient_of_its_mean_whatever_the_objective(options, reduction):
    """By enumeration of all groups of two completions of one or two tokens: exactly, completions that end early too."""
    found = expected_gradient(options, reduction, 2, 2, tasks=True)
    if options.objective != "rewards":
        found -= expected_gradient(options, reduction, 2, 2, tasks=False)
    assert gradient_of_the_mean_reward(2).norm() > 0.05
    torch.testing.assert_close(found, -gradient_of_the_mean_reward(2), rtol=1e-6, atol=1e-7)


def test_so_does_a_group_of_three_and_dividing_by_the_spread_does_not():
    target = -gradient_of_the_mean_reward(1)
    found = expected_gradient(LossOptions("rewards"), "sequence", 1, 3, tasks=True)
    torch.testing.assert_close(found, target, rtol=1e-6, atol=1e-7)
    divided = expected_gradient(LossOptions("rewards"), "sequence", 1, 3, tasks=True, scale=True)
    along = (divided * target).sum() / target.square().sum() * target
    assert (divided - along).norm() > 0.02 * divided.norm()  # it points elsewhere, at whatever scale


def test_advantages_written_out():
    """Two prompts of three rollouts; a missing reward moves nothing and counts in no mean."""
    nan = math.nan
    rewards = torch.tensor(
        [[1.0, 2.0], [0.0, nan], [1.0, 4.0], [0.5, nan], [nan, nan], [nan, nan]], dtype=torch.float64
    )
    index, weights = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([2.0, 0.5], dtype=torch.float64)
    first = [2 * (1 - 0.5) + 0.5 * (2 - 4), 2 * (0 - 1.0), 2 * (1 - 0.5) + 0.5 * (4 - 2)]
    assert_equal(task_advantages(rewards, weights, index), torch.tensor([*first, 0.0, 0.0, 0.0]))
    means = torch.tensor([2 / 3, 3.0])
    totals = torch.tensor([2 * (1 - means[0]) + 0.5 * (2 - means[1]), -2 * means[0], 2 * (1 - means[0]) + 0.5])
    scaled = task_advantages(rewards, weights, index, scale=True)
    torch.testing.assert_close(scaled[:3], torch.tensor(first) / (totals.square().sum() / 2).sqrt())
    assert scaled[3:].tolist() == [0, 0, 0]
    same = torch.full((6, 2), 0.1, dtype=torch.float64)
    assert task_advantages(same, weights, index, scale=True).tolist() == [0] * 6


@pytest.mark.parametrize("objective", ["sampled_reverse_kl", "reverse_kl", "rewards"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_loss_and_gradients_of_models_equal_plain_pytorch(objective, reduction):
    """In one micro-batch and in several; one rollout that was cut is left out."""
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    advantage = torch.tensor([0.5, -0.5, 2.0, -1.0])
    rollouts = make_rollouts([3, 7, 1, 5], num_rollouts=2, vocab_size=97, prompt_lengths=[2, 6])
    rollouts = replace(rollouts, task_advantage=advantage)
    options = LossOptions(objective, reduction, importance_clip=1.5)
    found = [gradients(student, teacher, rollouts, options, token_budget=budget) for budget in (10**6, 9)]
    assert (found[0][3], found[1][3] > 1) == (1, True)
    student.zero_grad(set_to_none=True)
    whole, losses = torch.tensor(0.0), []
    if objective != "rewards":
        whole = reference_loss(student, teacher, replace(rollouts, task_advantage=None), options)
    for row, length in enumerate(rollouts.completion_lengths.tolist()):
        prompt = rollouts.prompt_ids[row // 2][rollouts.prompt_mask[row // 2]]
        said = rollouts.completion_ids[row, :length]
        logits = student(torch.cat([prompt, said])[None]).logits[0, len(prompt) - 1 : -1]
        logprob = logits.log_softmax(-1).gather(1, said[:, None])[:, 0]
        ratio = (logprob.detach() - rollouts.logprob[row, :length]).exp().clamp(max=1.5)
        losses.append(-(ratio * advantage[row] * logprob).sum())
    expected = whole + torch.stack(losses).mean()
    expected.backward()
    for loss, _, each, _ in found:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(each[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_what_is_left_out_of_the_loss_has_no_credit():
    rollouts = make_rollouts([3, 2, 1, 5], num_rollouts=2, vocab_size=97)
    finished = torch.tensor([True, False, True, True])
    group = Group.of(replace(rollouts, task_advantage=torch.tensor([3.0, 5.0, -6.0, 9.0]), finished=finished))
    weights = token_weights(group.completion_lengths, "sequence", finished)
    credit = (task_credit(group, weights) * weights).split([3, 2, 1, 5])
    assert [part.tolist() for part in credit] == [[1.0] * 3, [0.0] * 2, [-2.0], [3.0] * 5]


# ---- Runs ----------------------------------------------------------------------------------------------------------

GOOD = """
def few_spaces(record, completion):
    return 1 - completion.count(" ") / max(1, len(completion)) + 0.1 * len(record["prompt"])
"""


@pytest.fixture
def reward_file(tmp_path):
    """Writes a file of functions; gives the reference of one."""

    def write(source: str = GOOD, function: str = "few_spaces") -> str:
        path = tmp_path / "reward.py"
        path.write_text(source)
        return f"{path}:{function}"

    return write


def with_rewards(reference: str, weight: float = 1.0, **options) -> dict:
    return {"rewards": [{"function": reference, "weight": weight, **options}], "training.num_rollouts_per_prompt": 4}


@pytest.mark.parametrize("objective", ["sampled_reverse_kl", "reverse_kl", "rewards"])
def test_a_run_with_rewards_says_what_they_were(write_config, tmp_path, reward_file, objective):
    changes = with_rewards(reward_file()) | {"loss.objective": objective, "training.prompts_per_step": 2}
    changes["rewards"].append({"function": "contains:prompt", "weight": 0})
    run = execute(write_config(changes))
    lines, rollouts = metrics_of(tmp_path / "run"), read_json_lines(tmp_path / "run" / "rollouts.jsonl")
    for line in lines:
        own = [each for each in rollouts if each["step"] == line["step"]]
        values = [each["rewards"]["few_spaces"] for each in own]
        expected = [1 - o["completion"].count(" ") / max(1, len(o["completion"])) + 0.1 * len(o["prompt"]) for o in own]
        assert values == pytest.approx(expected)
        assert line["reward"] == line["reward/few_spaces"] == pytest.approx(sum(values) / len(values))
        assert line["reward/contains"] == 0
        groups = [values[i : i + 4] for i in range(0, len(values), 4)]
        contrast = sum(max(group) > min(group) for group in groups) / len(groups)
        assert (line["reward_missing"], line["reward_contrast"]) == (0, contrast)
    assert all("seconds_rewards" in line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl"))
    assert not run.parts.rewards.tasks[0].grader._processes
    page = (tmp_path / "run" / "report.html").read_text()
    assert ":few_spaces (weight 1)" in page
    assert "all, weighted" in page


def test_rewards_alone_are_learned(write_config, tmp_path, reward_file):
    """Of a model that begins at random: fewer e's among its letters, without the teacher."""
    source = "def vowels(record, completion):\n    return -sum(c in 'aeiou' for c in completion)\n"
    reference = reward_file(source, "vowels")
    changes = with_rewards(reference) | {
        "loss.objective": "rewards",
        "training.num_rollouts_per_prompt": 32,
        "training.prompts_per_step": 5,
        "rollout.prompts_per_batch": 5,
        "training.num_epochs": 25,
        "training.learning_rate": 1e-2,
        "prompts.eval": None,
    }
    execute(write_config(changes))
    found = [line["reward"] for line in metrics_of(tmp_path / "run")]
    assert sum(found[-5:]) / 5 > 0.3 * sum(found[:5]) / 5 < 0


def test_a_weight_of_zero_only_watches(write_config, tmp_path, reward_file):
    watched = with_rewards(reward_file(), 0.0) | {"training.output_dir": str(tmp_path / "watched")}
    execute(write_config(watched))
    execute(write_config({"training.num_rollouts_per_prompt": 4, "training.output_dir": str(tmp_path / "plain")}))
    plain, found = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "watched")
    assert all(line["reward"] == 0 < line["reward/few_spaces"] for line in found)
    assert [{key: line[key] for key in plain[0]} for line in found] == plain
    ours, theirs = weights_of(tmp_path / "plain"), weights_of(tmp_path / "watched")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("objective", ["sampled_reverse_kl", "reverse_kl"])
def test_a_run_is_continued_with_the_rewards_that_it_had(write_config, tmp_path, reward_file, objective):
    """In the midst of a batch, whose rewards another call would give otherwise."""
    source = "import random\ndef few_spaces(record, completion):\n    return random.random()\n"
    reference = reward_file(source + GOOD)  # the second definition counts
    changes = with_rewards(reference) | {"loss.objective": objective, "training.output_dir": str(tmp_path / "one")}
    execute(write_config(changes))
    changes["training.output_dir"] = str(tmp_path / "other")
    for steps in (3, None):
        execute(write_config(changes | {"training.max_steps": steps}))
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_rewards_in_hand_are_not_judged_again(write_config, tmp_path, reward_file):
    """A function that draws at random gives the steps of one batch what it gave before the interruption."""
    reference = reward_file("import random\ndef chance(record, completion):\n    return random.random()\n", "chance")
    changes = with_rewards(reference) | {"rollout.prompts_per_batch": 5}
    execute(write_config(changes | {"training.max_steps": 2}))
    whole = [line["rewards"]["chance"] for line in read_json_lines(tmp_path / "run" / "rollouts.jsonl")]
    (tmp_path / "reward.py").write_text((tmp_path / "reward.py").read_text().replace("random.random()", "7.0"))
    accepted = {"training.accept_changed_rewards": True}
    execute(write_config(changes | accepted))
    found = [line["rewards"]["chance"] for line in read_json_lines(tmp_path / "run" / "rollouts.jsonl")]
    assert found[:8] == whole
    assert all(value < 1 for value in found[8:])  # all five prompts were one batch


def test_a_changed_reward_file_is_refused_and_how_to_accept_it_is_said(write_config, tmp_path, reward_file, capsys):
    changes = with_rewards(reward_file())
    execute(write_config(changes | {"training.max_steps": 2}))
    reward_file(GOOD + "# another version\n")
    with pytest.raises(CheckpointError, match=r"reward.py:few_spaces has changed .* training.accept_changed_rewards"):
        execute(write_config(changes))
    execute(write_config(changes | {"training.accept_changed_rewards": True}))
    assert len(metrics_of(tmp_path / "run")) == 5
    execute(write_config(changes))  # the new file is what the newest checkpoint knows
    with pytest.raises(CheckpointError, match="rewards: was"):
        execute(write_config(changes | with_rewards(reward_file(), 0.5)))


BAD = """
import os, subprocess, sys, time

def bad(record, completion):
    word = record["prompt"]
    if "red" in word: raise RuntimeError("no colour")
    if "green" in word:
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    if "blue" in word: os._exit(3)
    if "grey" in word: return [1.0, 2.0]
    print("fine" * 10**5)
    return len(completion)
"""


def test_a_bad_reward_function_costs_its_rewards_and_a_line(write_config, tmp_path, reward_file):
    import psutil

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    changes = with_rewards(reward_file(BAD, "bad"), timeout_seconds=1.0) | {"rollout.prompts_per_batch": 1}
    execute(write_config(changes))
    lines = metrics_of(tmp_path / "run")
    prompts = {line["step"]: line["prompt"] for line in read_json_lines(tmp_path / "run" / "rollouts.jsonl")}
    assert [line["reward_missing"] for line in lines] == [0 if "pink" in prompts[i] else 4 for i in range(1, 6)]
    said = [event["message"] for event in events_of(tmp_path / "run") if event["event"] == "reward"]
    for words in ("no colour", "found [1.0, 2.0]"):
        assert any(words in message for message in said), said
    assert any("no answer within 1 s" in message or "exit status 3" in message for message in said), said
    assert len(said) >= 3
    left = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not left


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.num_rollouts_per_prompt": 1}, "num_rollouts_per_prompt is 1"),
        ({"rewards": [{"function": "json_valid", "weight": 0}], "loss.objective": "rewards"}, "none with a weight"),
        ({"rewards": [], "loss.scale_rewards": True}, "none with a weight"),
        ({"loss.baseline": "exact"}, "loss.baseline is 'exact'"),
        ({"rewards": [{"function": "json_valid", "weigth": 1}]}, "did you mean 'rewards.weight'"),
        ({"rewards": [{"function": "json_valid", "timeout_seconds": 0}]}, "rewards.timeout_seconds, entry 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(write_config, changes, words):
    with pytest.raises(ConfigError, match=words):
        load_config(write_config(with_rewards("json_valid") | changes))


@pytest.mark.parametrize(
    ("reference", "words"),
    [("jsn_valid", "json_valid"), ("absent.py:f", "no such file"), ("FILE:other", "other"), ("FILE:broken", "line 3")],
)
def test_a_function_that_is_not_there_is_one_message_and_status_2(
    write_config, tmp_path, reward_file, capsys, reference, words
):
    source = "def broken():\n    pass\n1 / 0\n" if "broken" in reference else GOOD
    path = reward_file(source, "x").rpartition(":")[0]
    assert main(["--config", str(write_config(with_rewards(reference.replace("FILE", path))))]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_the_configuration_of_a_run_is_read_back(write_config, tmp_path, reward_file):
    config = load_config(write_config(with_rewards(reward_file())))
    execute(write_config(with_rewards(reward_file())))
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 5
