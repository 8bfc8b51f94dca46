"""A teacher of the student's own weights that follows them: `teacher.update`."""

import json

import pytest
import torch
from conftest import tiny_model
from rich.console import Console
from test_stopping import stop_after
from test_train import assert_same_run, execute, metrics_of

from distill.config import ConfigError, LoraConfig, load_config
from distill.models import add_adapters
from distill.run import Run, checkpoint
from distill.runtime import read_json_lines
from distill.teachers import FollowingTeacher

SELF = {
    "teacher.model": "base",
    "teacher.prompt_template": "{{ prompt }} (It is {{ answer }}.)",
    "teacher.update": "ema:0.75",
    "training.learning_rate": 3e-3,
    "training.save_every": 1,
    "training.prompts_per_step": 2,
    "training.num_epochs": 3,
    "training.eval_every": 2,
}


@pytest.fixture
def write_self(write_config, tmp_path):
    """Writes the configuration of a run whose teacher is the student with an answer in its prompt."""

    def write(changes=None, name="config.yaml"):
        for kind, words in (("train", ("red", "blue", "grey")), ("eval", ("pink", "black"))):
            records = [{"prompt": f"Say {word}.", "answer": f"{word} {word}"} for word in words]
            (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        files = {"prompts.train": str(tmp_path / "train.jsonl"), "prompts.eval": str(tmp_path / "eval.jsonl")}
        return write_config(SELF | files | (changes or {}), name)

    return write


def trained(model) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]


def moved(model, seed: int) -> None:
    """Adds something to every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("update", ["every:2", "ema:0.75"])
def test_a_teacher_takes_over_or_averages_what_is_trained(update, adapters):
    student = tiny_model("llama", seed=1)  # whose head is its embedding
    if adapters:
        pytest.importorskip("peft")
        add_adapters(student, LoraConfig(rank=2), 0)
    teacher, expected = FollowingTeacher(student, update), trained(student)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(teacher.model(ids).logits, student(ids).logits)
    for step in (1, 2, 3):
        moved(student, step)
        teacher.after_step(step)
        if update == "ema:0.75":
            expected = [0.75 * old + 0.25 * new for old, new in zip(expected, trained(student), strict=True)]
        elif step == 2:
            expected = trained(student)
        torch.testing.assert_close([*teacher.weights.values()], expected)
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    shared = {w.data_ptr() for w in student.parameters()} & {w.data_ptr() for w in teacher.model.parameters()}
    assert len(shared) == (sum(not w.requires_grad for w in student.parameters()) if adapters else 0)
    with torch.no_grad():  # it computes with what it has taken over
        for name, weight in teacher.weights.items():
            student.get_parameter(name).copy_(weight)
    assert torch.equal(teacher.model(ids).logits, student(ids).logits)


@pytest.mark.parametrize(
    ("changes", "stop_at"), [({}, 1), ({"teacher.update": "every:2"}, 3), ({"student.lora.rank": 4}, 2)], ids=str
)
def test_a_run_whose_teacher_follows_continues_to_the_same_numbers(write_self, tmp_path, stop_at, changes):
    if "student.lora.rank" in changes:
        pytest.importorskip("peft")
    execute(write_self(changes | {"training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    path, steps = write_self(changes), []
    run = Run(load_config(path), Console(quiet=True), lambda: steps.append(1) or stop_after(steps, stop_at + 1))
    assert run.execute() == 143
    execute(path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    one, other = (read_json_lines(tmp_path / name / "evaluations.jsonl") for name in ("whole", "run"))
    assert one == other


def test_evaluations_are_against_the_teacher_of_step_0_and_training_is_not(write_self, tmp_path):
    following = execute(write_self({"teacher.update": "every:1"}))
    frozen = execute(write_self({"teacher.update": "frozen", "training.output_dir": str(tmp_path / "frozen")}))
    one, other = (metrics_of(tmp_path / name) for name in ("run", "frozen"))
    assert one[0] == other[0]
    assert one[-1]["reverse_kl_exact"] != other[-1]["reverse_kl_exact"]
    assert following.progress.evaluations[0] == frozen.progress.evaluations[0]
    # The weights that evaluations are against are those that the student had, not what the teacher has become.
    parts = following.parts
    first, now = parts.first_teachers[0].head.weight, parts.teachers[0].head.weight
    assert torch.equal(first, frozen.parts.teachers[0].head.weight)
    assert torch.equal(now, parts.student.get_output_embeddings().weight)
    assert not torch.equal(first, now)


def test_without_held_out_prompts_the_teacher_of_step_0_is_not_kept(write_self):
    parts = execute(write_self({"prompts.eval": None, "training.eval_every": None})).parts
    assert parts.first_teachers is parts.teachers


def test_a_checkpoint_holds_the_weights_of_the_teacher(write_self, tmp_path):
    run = execute(write_self())
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    found = {name: torch.zeros(shape) for name, shape in saved.shapes.items() if name.endswith("/teacher")}
    saved.read(found)
    weights = run.parts.following.weights
    assert {f"{name}/teacher" for name in weights} == set(found)
    assert all(torch.equal(found[f"{name}/teacher"], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher.model": "another/model"}, "teacher.model 'another/model' is another model than the student's"),
        ({"student.drop_layers": [1]}, "the student has other layers than its teacher"),
        (
            {"teacher.server": "http://127.0.0.1:1", "loss.objective": "sampled_reverse_kl"},
            "leave teacher.server out",
        ),
        ({"teacher.offload": True}, "leave teacher.offload out"),
        ({"teacher.precision": "int8"}, "weights of int8 cannot follow"),
        ({"teacher.update": "ema:1.5"}, "teacher.update"),
    ],
)
def test_what_cannot_follow_is_refused_with_the_reason(write_self, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(write_self(changes))
