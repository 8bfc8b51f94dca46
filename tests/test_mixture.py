"""Groups of rollouts and written answers: the gradient by enumeration, which sequences a step has, and whole runs."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from test_advantage import completions
from test_loss import parts_of
from test_train import events_of, execute, metrics_of

from distill.config import ConfigError, TrainingConfig, load_config
from distill.loss import Group, LossOptions, Rollouts, accumulate_gradients, score
from distill.prompts import PromptSet
from distill.prompts.answers import Answer
from distill.run import CheckpointError
from distill.runtime import read_json_lines
from distill.runtime.micro_batches import micro_batches
from distill.teachers import NO_TEACHER
from distill.training import Answers, Mixture, mixture_metrics

V = 5
ANSWERED = [{"prompt": f"Say {word}.", "completion": word} for word in ("red", "a", "grey", "blue", "pinks")]


def answers_of(*said: tuple[list[int], list[int]], ends: tuple[int, ...] = (0,)) -> Answers:
    """Prompts with their answers, as ids."""
    nothing = [None] * len(said)
    answers = [Answer(ids, ids[-1] in ends) for _, ids in said]
    prompts = PromptSet([p for p, _ in said], nothing, nothing, nothing, nothing, nothing, ("prompt",), answers=answers)
    return Answers(prompts, None, 0, torch.device("cpu"), seed=0, shuffle=False)


def rollouts_of(prompts: list[list[int]], said: list[list[int]], logprob: torch.Tensor | None = None) -> Rollouts:
    """Completions of prompts of one length, as many of each."""
    lengths = torch.tensor([len(ids) for ids in said])
    ids = torch.zeros(len(said), int(lengths.max()), dtype=torch.int64)
    for row, each in zip(ids, said, strict=True):
        row[: len(each)] = torch.tensor(each)
    logprob = torch.zeros(ids.shape) if logprob is None else logprob
    prompt_ids, finished = torch.tensor(prompts), torch.tensor([each[-1] == 0 for each in said])
    mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    return Rollouts(prompt_ids, mask, ids, lengths, logprob, logprob, finished, len(said) // len(prompts))


def gradient(student, teachers, group: Group, options: LossOptions, budget: int = 10**6) -> dict[str, torch.Tensor]:
    student.zero_grad(set_to_none=True)
    parts = micro_batches(*group.lengths, budget)
    models = [teacher if teacher is NO_TEACHER else parts_of(teacher, torch.float64) for teacher in teachers]
    own = parts_of(student, torch.float64)
    accumulate_gradients(own, models, score(models, group, parts), group, parts, options)
    return {name: p.grad.clone() for name, p in student.named_parameters()}


def total(parts: list[tuple[float, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    return {name: sum(weight * each[name] for weight, each in parts) for name in parts[0][1]}


@pytest.mark.parametrize(
    ("options", "of_answers"),
    [
        (LossOptions("reverse_kl"), None),
        (LossOptions("sampled_reverse_kl"), None),
        (LossOptions("sampled_reverse_kl", baseline="exact", discount=0.5), "forward_kl"),
        (LossOptions("jsd", beta=0.3), None),
        (LossOptions("forward_kl"), "cross_entropy"),
        (LossOptions("sampled_reverse_kl"), "cross_entropy"),
    ],
    ids=lambda each: f"{each.objective}-{each.baseline}" if isinstance(each, LossOptions) else str(each),
)
def test_the_mean_gradient_is_the_shares_of_both_by_enumeration(options, of_answers):
    """Every rollout of one or two tokens beside one answer: a half of what rollouts alone have in the mean, and a half
    of the answer's, whose states are fixed."""
    student = tiny_model("llama", vocab_size=V, seed=1, dtype=torch.float64)
    teacher = tiny_model("llama", vocab_size=V, seed=2, dtype=torch.float64)
    training = TrainingConfig(num_rollouts_per_prompt=2, off_policy_fraction=0.5, off_policy_objective=of_answers)
    answers = answers_of(([3, 1], [2, 4, 0]))
    mixture = Mixture(answers, training, None, 1, 0)
    teachers = [teacher] if mixture.scored else [teacher, NO_TEACHER]
    options = replace(options, of_written=of_answers if mixture.scored else None)
    prompt, mixed, alone = [1, 2, 3], [], []
    for said in completions(2, ends=True):
        logits = student(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1].detach()
        probability = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum().exp().item()
        rollouts = rollouts_of([prompt], [list(said)])
        kept, group = mixture(rollouts, [0], step=0)
        assert kept is rollouts
        assert group.written.tolist() == [False, True]
        mixed.append((probability, gradient(student, teachers, group, options)))
        alone.append((probability, gradient(student, [teacher], Group.of(rollouts), options)))
    assert sum(probability for probability, _ in mixed) == pytest.approx(1)
    student.zero_grad(set_to_none=True)
    ids = torch.tensor([[3, 1, 2, 4, 0]])
    own, other = (model(ids).logits[0, 1:-1].log_softmax(-1) for model in (student, teacher))
    answer_loss(own, other.detach(), of_answers or options.objective, options.beta).mean().backward()
    of_answer = {name: p.grad.clone() for name, p in student.named_parameters()}
    expected = total([(0.5, total(alone)), (0.5, of_answer)])
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in total(mixed).items():
        # The models' own norms run in float32 inside.
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6 * largest)


def answer_loss(own: torch.Tensor, other: torch.Tensor, objective: str, beta: float) -> torch.Tensor:
    """[3] of the tokens 2, 4, 0."""
    if objective == "cross_entropy":
        return -own.gather(1, torch.tensor([[2], [4], [0]]))[:, 0]
    if objective == "forward_kl":
        return (other.exp() * (other - own)).sum(-1)
    if objective == "jsd":
        middle = (beta * other.exp() + (1 - beta) * own.exp()).log()
        to_middle = [(one.exp() * (one - middle)).sum(-1) for one in (other, own)]
        return beta * to_middle[0] + (1 - beta) * to_middle[1]
    return (own.exp() * (own - other)).sum(-1)


def test_a_split_group_has_the_same_gradient():
    student = tiny_model("llama", vocab_size=V, seed=1, dtype=torch.float64)
    teacher = tiny_model("llama", vocab_size=V, seed=2, dtype=torch.float64)
    training = TrainingConfig(num_rollouts_per_prompt=3, prompts_per_step=2, off_policy_fraction=1 / 3)
    mixture = Mixture(answers_of(([3, 1], [2, 4, 0]), ([2], [1])), training, None, 1, 0)
    rollouts = rollouts_of([[1, 2], [4, 1]], [[1], [2, 3, 0], [4, 4], [0]])
    rollouts = replace(rollouts, task_advantage=torch.tensor([0.5, -0.5, 1.0, -1.0]))
    for reduction in ("sequence", "token"):
        options = LossOptions("reverse_kl", reduction, importance_clip=2.0)
        _, group = mixture(rollouts, [0, 1], step=0)
        assert group.task_advantage.tolist() == [0.5, -0.5, 1.0, -1.0, 0.0, 0.0]
        whole, split = (gradient(student, [teacher], group, options, budget) for budget in (10**6, 4))
        largest = max(value.abs().max().item() for value in whole.values())
        for name, value in whole.items():
            assert value.isfinite().all()
            torch.testing.assert_close(split[name], value, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("B", [1, 2, 3, 5])
@pytest.mark.parametrize("N", [1, 2, 3, 4])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9])
def test_a_step_has_as_many_sequences_as_without_and_round_f_b_n_are_answers(B, N, fraction):
    training = TrainingConfig(num_rollouts_per_prompt=N, prompts_per_step=B, off_policy_fraction=fraction)
    M = round(fraction * B * N)
    if M in (0, B * N):
        return
    answers = answers_of(*(([1], [2, 0]) for _ in range(3)))
    mixture, sampled = Mixture(answers, training, None, 1, 0), training.sampled_rollouts
    for prompts in range(1, B + 1):  # the last step of a pass may have fewer
        said = [[1 + row % sampled, 0] for row in range(prompts * sampled)]
        kept, group = mixture(rollouts_of([[p] for p in range(prompts)], said), range(prompts), step=0)
        of_step = M if prompts == B else min(round(fraction * prompts * N), prompts * N - 1)
        written = 0 if group.written is None else int(group.written.sum())
        assert written == of_step
        assert len(kept.completion_lengths) == prompts * N - written
        assert len(group.completion_lengths) == prompts * N
        counts = kept.prompt_index.bincount(minlength=prompts)
        assert counts.max() - counts.min() <= 1
        assert kept.completion_ids[:, 0].tolist() == [1 + n for count in counts.tolist() for n in range(count)]


def test_answers_come_in_passes_whatever_step_asks():
    answers = answers_of(*(([1], [token]) for token in range(1, 5)))
    found = []
    training = TrainingConfig(num_rollouts_per_prompt=4, off_policy_fraction=0.75)
    mixture = Mixture(answers, training, None, 1, 0)
    for step in range(4):
        _, group = mixture(rollouts_of([[1]], [[1]]), [0], step)
        found += group.completion_ids[group.written, 0].tolist()
    assert found == [1, 2, 3, 4] * 3


def test_no_part_of_a_step_is_in_the_figures_of_the_other():
    """The rollouts' figures are those of the rollouts alone."""
    student = tiny_model("llama", vocab_size=V, seed=1)
    teacher = tiny_model("llama", vocab_size=V, seed=2)
    training = TrainingConfig(num_rollouts_per_prompt=3, prompts_per_step=2, off_policy_fraction=1 / 3)
    mixture = Mixture(answers_of(([3, 1], [2, 4, 0]), ([2], [1])), training, None, 1, 0)
    rollouts = rollouts_of([[1, 2], [4, 1]], [[1], [2, 3, 0], [4, 4], [0]])
    options, norm = LossOptions("reverse_kl"), torch.tensor(1.0)
    _, group = mixture(rollouts, [0, 1], step=0)
    found = []
    for each in (group, Group.of(rollouts)):
        parts = [torch.arange(len(each.completion_lengths))]
        own, other = parts_of(student), parts_of(teacher)
        student.zero_grad(set_to_none=True)
        result = accumulate_gradients(own, [other], score([other], each, parts), each, parts, options)
        found.append((result, *mixture_metrics(result, each, norm, options)))
    (mixed, ours, rows), (alone, theirs, rows_alone) = found
    assert rows == pytest.approx(rows_alone, rel=1e-5)
    # The loss is the whole group's; agreement is over evenly spaced tokens of all; noise relative to signal is alike.
    apart = {"loss", "top_token_agreement", "gradient_noise_within", "gradient_noise_between", "gradient_signal"}
    for name in set(theirs) - apart - {"off_policy_sequences", "off_policy_tokens"}:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6, nan_ok=True), name
    assert ours["gradient_noise_within"] / ours["gradient_signal"] == pytest.approx(
        theirs["gradient_noise_within"] / theirs["gradient_signal"], rel=1e-4
    )
    assert (ours["off_policy_sequences"], ours["off_policy_tokens"]) == (2, 4)
    assert ours["loss"] == pytest.approx(2 / 3 * alone.loss.item() + ours["off_policy_loss"], rel=1e-5)
    assert ours["off_policy_cross_entropy"] == pytest.approx(-mixed.stats.student_logprob[-4:].mean().item(), rel=1e-5)
    assert (theirs["off_policy_sequences"], theirs["off_policy_tokens"]) == (0, 0)


@pytest.fixture
def config(write_config, tmp_path):
    path = tmp_path / "answered.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in ANSWERED))

    def write(changes=None, name="config.yaml"):
        common = {
            "prompts.train": str(path),
            "rollout.prompts_per_batch": 4,
            "training.prompts_per_step": 2,
            "training.num_rollouts_per_prompt": 4,
            "training.off_policy_fraction": 0.25,
        }
        return write_config(common | (changes or {}), name)

    return write


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.off_policy_objective": "cross_entropy"},
        {"loss.objective": "sampled_reverse_kl", "loss.baseline": "group", "training.off_policy_fraction": 0.4},
        {"teacher.system_prompt": "Be brief.", "training.off_policy_objective": "cross_entropy"},
        {"training.off_policy_objective": "jsd", "rollout.mask_truncated": True, "training.num_rollouts_per_prompt": 2},
    ],
    ids=["alike", "cross_entropy", "baseline", "own_prompts", "few"],
)
def test_a_run_with_answers_learns_both(config, tmp_path, changes):
    run = execute(config(changes | {"training.num_epochs": 3}))
    lines, options = metrics_of(tmp_path / "run"), run.parts.config.training
    assert len(lines) == 9
    by_step: dict[int, list[dict]] = {}
    for record in read_json_lines(tmp_path / "run" / "rollouts.jsonl"):
        by_step.setdefault(record["step"], []).append(record)
    for line in lines:
        prompts = 1 if line["step"] % 3 == 0 else 2
        sequences = prompts * options.num_rollouts_per_prompt
        assert line["off_policy_sequences"] + len(by_step[line["step"]]) == sequences
        assert line["completion_tokens"] == sum(record["completion_length"] for record in by_step[line["step"]])
        assert all(record["reverse_kl_exact"] is not None for record in by_step[line["step"]])
        assert line["off_policy_sequences"] == round(options.off_policy_fraction * sequences)
    known = [line["off_policy_reverse_kl_exact"] for line in lines if line["off_policy_sequences"]]
    assert all((value is None) == (changes.get("training.off_policy_objective") == "cross_entropy") for value in known)
    if changes.get("training.off_policy_objective") == "cross_entropy":
        first, last = lines[0]["off_policy_cross_entropy"], lines[7]["off_policy_cross_entropy"]
        assert last < first
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["answer_tokens"] == sum(line["off_policy_tokens"] for line in lines)
    assert not [event for event in events_of(tmp_path / "run") if event["event"] == "skipped"]


def test_rewards_are_of_rollouts(config, tmp_path):
    """Also where some that were sampled are left out."""
    (tmp_path / "own.py").write_text("def long(record, completion):\n    return float(len(completion))\n")
    rewards = {"rewards": [{"function": f"{tmp_path / 'own.py'}:long", "weight": 0.1}]}
    execute(config(rewards | {"training.off_policy_fraction": 0.4}))  # 3 of 8
    records = read_json_lines(tmp_path / "run" / "rollouts.jsonl")
    assert all(record["rewards"]["long"] >= 0 for record in records)
    for line in metrics_of(tmp_path / "run"):
        own = [record["rewards"]["long"] for record in records if record["step"] == line["step"]]
        assert line["reward/long"] == pytest.approx(sum(own) / len(own))
        assert math.isfinite(line["loss"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.off_policy_fraction": 0.05}, "is rounded to 0, which leaves no answer"),
        ({"training.off_policy_fraction": 0.99}, "is rounded to 8, which leaves no rollout"),
        ({"training.off_policy_fraction": 1}, "less than 1"),
        (
            {"training.off_policy_fraction": 0, "training.off_policy_objective": "jsd"},
            "and training.off_policy_fraction is 0",
        ),
        (
            {"loss.objective": "rewards", "rewards": ["contains"]},
            "says nothing of written answers: set training.off_policy_objective",
        ),
        (
            {"loss.objective": "sampled_reverse_kl", "loss.baseline": "group", "training.off_policy_fraction": 0.75},
            "leaves each prompt one",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(config, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_config(config(changes))


def test_another_fraction_would_not_continue_truly(config):
    execute(config({"training.max_steps": 1}))
    with pytest.raises(CheckpointError, match=r"training\.off_policy_fraction: was 0\.25, now 0\.5"):
        execute(config({"training.max_steps": 2, "training.off_policy_fraction": 0.5}))
