"""The warm start on written answers: its loss, its place in a run, and what a run that was stopped makes of it."""

import itertools
import json
import math
import re
from signal import SIGTERM

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from rich.console import Console
from test_train import assert_same_run, events_of, execute, metrics_of, weights_of
from transformers import AutoModelForCausalLM

from distill.config import ConfigError, load_config
from distill.prompts import PromptError
from distill.report.charts import run_charts
from distill.run import CheckpointError, Run
from distill.run.early_stopping import REVERSE_KL, best_step
from distill.runtime import read_json_lines

ANSWERED = [
    {"prompt": "Say red.", "completion": "red"},
    {"prompt": "Say green.", "completion": "grn"},
    {"prompt": "Say blue.", "completion": "a longer blue"},
    {"prompt": "Say pink.", "completion": "p"},
    {"prompt": "Say nothing."},
]


@pytest.fixture
def config(write_config, tmp_path):
    """Writes a configuration whose training prompts have answers, with a warm start of two passes in steps of three."""
    path = tmp_path / "answered.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in ANSWERED))

    def write(changes=None, name="config.yaml", **warm_start):
        warm_start = {"epochs": 2, "answers_per_step": 3} | warm_start
        return write_config(
            {"prompts.train": str(path), "training.max_steps": 3, "training.warm_start": warm_start} | (changes or {}),
            name,
        )

    return write


def plain_batch(answers, indices) -> tuple[torch.Tensor, torch.Tensor]:
    """What plain transformers is trained on: padded ids, and labels for the answers' tokens alone."""
    rows = [(answers.prompts.token_ids[i], answers.prompts.answers[i].token_ids) for i in indices]
    width = max(len(prompt) + len(said) for prompt, said in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
    for row, (prompt, said) in enumerate(rows):
        ids[row, : len(prompt) + len(said)] = torch.tensor(prompt + said)
        labels[row, len(prompt) : len(prompt) + len(said)] = torch.tensor(said)
    return ids, labels


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_steps_of_cross_entropy_are_those_of_plain_transformers(config, tmp_path, family):
    """The loss that a model itself gives for labels, at the weights that Adam and clipping make of it, step by step."""
    student, tokenizer = tmp_path / "student", tiny_tokenizer()
    tiny_model(family, vocab_size=len(tokenizer), seed=1).save_pretrained(student)
    tokenizer.save_pretrained(student)
    changes = {"loss.reduction": "token", "training.max_steps": 0, "loss.temperature": 2.0}
    run = execute(config(changes | {"student.model": str(student)}, epochs=3))
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    optimizer, expected = torch.optim.Adam(model.parameters(), lr=1e-3), []
    answers = run.parts.answers
    for epoch in range(3):
        order = answers.order(epoch)
        for indices in (order[:3], order[3:]):
            ids, labels = plain_batch(answers, indices)
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            expected.append((loss.item(), norm.item()))
    lines = metrics_of(tmp_path / "run")
    found = [(line["loss"], line["grad_norm"]) for line in lines]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for line in lines:
        assert line["cross_entropy"] == pytest.approx(line["loss"], rel=1e-5)
    assert expected[0][0] > expected[-1][0] + 0.5


def test_every_pass_has_all_answers_in_another_order(config):
    answers = Run(load_config(config()), Console(quiet=True), lambda: None).parts.answers
    orders = [answers.order(epoch) for epoch in range(6)]
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3]] * 6
    assert len(set(map(tuple, orders))) > 2
    assert answers.stream(2, 9) == [*orders[0][2:], *orders[1], *orders[2][:3]]


def test_its_steps_are_counted_apart(config, tmp_path):
    """Not in max_steps, not in the schedule, with a null sampled reverse KL, and no teacher at work."""
    run = execute(config({"training.lr_schedule": "linear", "training.warmup_steps": 1, "training.eval_every": 2}))
    lines = metrics_of(tmp_path / "run")
    assert [(line["step"], line.get("phase")) for line in lines] == [
        *((step, "warm_start") for step in (1, 2, 3, 4)),
        *((step, None) for step in (5, 6, 7)),
    ]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 0, 0, 0]
    for line in lines[:4]:
        assert [line[key] for key in ("reverse_kl", "reverse_kl_exact", "teacher_entropy")] == [None] * 3
        assert line["cross_entropy"] > 0
        assert line["student_entropy"] > 0
    assert all(line["reverse_kl"] is not None and "cross_entropy" not in line for line in lines[4:])
    rates = [line["learning_rate"] for line in lines]
    # Its own warm-up and fall, then the run's.
    assert rates == pytest.approx([1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3, 1e-3, 1e-3, 5e-4])
    evaluations = read_json_lines(tmp_path / "run" / "evaluations.jsonl")
    assert [each["step"] for each in evaluations] == [0, 2, 4, 6, 7]
    assert {record["step"] for record in read_json_lines(tmp_path / "run" / "rollouts.jsonl")} == {5, 6, 7}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["warm_start"]["steps"]) == (3, 4)
    assert summary["warm_start"]["eval_reverse_kl"] == evaluations[2]["reverse_kl"]
    assert summary["answer_tokens"] == sum(line["completion_tokens"] for line in lines[:4])
    assert summary["completion_tokens"] == sum(line["completion_tokens"] for line in lines[4:])
    assert run.parts.trainer.optimizer.state[next(iter(run.parts.trainer.parameters.values()))]["step"] == 3


def test_the_steps_after_it_are_those_of_a_run_of_the_model_that_it_left(config, tmp_path):
    """Bit for bit: rollouts, optimizer and schedule begin anew."""
    execute(config({"training.output_dir": str(tmp_path / "whole")}))
    execute(config({"training.output_dir": str(tmp_path / "warm"), "training.max_steps": 0}))
    after = config({"student.model": str(tmp_path / "warm" / "final"), "training.output_dir": str(tmp_path / "after")})
    text = after.read_text().split("\n")
    start = text.index("  warm_start:")
    del text[start : start + 3]
    after.write_text("\n".join(text))
    execute(after)
    whole, alone = weights_of(tmp_path / "whole"), weights_of(tmp_path / "after")
    assert all(torch.equal(whole[name], alone[name]) for name in whole)
    lines = [
        [{key: value for key, value in line.items() if key != "step"} for line in metrics_of(tmp_path / name)]
        for name in ("whole", "after")
    ]
    assert lines[0][4:] == lines[1]


def test_it_learns_from_a_teacher_where_that_is_asked(config, tmp_path):
    run = execute(config(objective="forward_kl", learning_rate=3e-3, epochs=10, answers_per_step=4))
    lines = metrics_of(tmp_path / "run")[:10]
    assert all(line["phase"] == "warm_start" and line["reverse_kl"] is None for line in lines)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["reverse_kl_exact"] < lines[0]["reverse_kl_exact"]
    group = run.parts.answers.rollouts(run.parts.answers.indices)
    assert group.completion_lengths.tolist() == [4, 4, 6, 2]
    assert group.finished.tolist() == [True, True, False, True]


def test_answers_may_have_a_file_of_their_own(config, tmp_path, tiny_pair):
    """With a teacher that reads other prompts, and answers that are left out where they are cut."""
    path = tmp_path / "others.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    changes = {"prompts.answers": str(path), "teacher.system_prompt": "Be brief.", "rollout.mask_truncated": True}
    run = execute(config(changes, objective="forward_kl"))
    assert (run.parts.warm_steps, run.parts.warm_start.per_step) == (2, 1)
    assert metrics_of(tmp_path / "run")[0]["completion_tokens"] == 2
    assert run.parts.answers.prompts.texts == ["a"]
    own, theirs = run.parts.answers.rollouts([0]), run.parts.answers.view([0])
    assert theirs.prompts[0][1].sum() > own.prompt_mask.sum()


def test_the_phases_stand_on_one_page(config, tmp_path):
    """The warm start, the mixture and each metric, with a line where one ends and the other begins."""
    changes = {"training.off_policy_fraction": 0.5, "training.eval_every": 2, "evaluation.metrics": ["json_valid"]}
    execute(config(changes))
    run = tmp_path / "run"
    text = (run / "report.html").read_text()
    charts = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', text)[1])
    titles = re.findall(r"<h2>(.*?)</h2>\n<div id", text)
    by_title = dict(zip(titles, charts, strict=True))
    assert titles[:4] == ["Reverse KL", "json_valid", "Written answers", "Reverse KL by position"]
    for title, chart in by_title.items():
        lines = [made for made in objects(chart) if made.get("name") == "Span"]
        over_steps = title != "Reverse KL by position"
        assert [line["attributes"]["location"] for line in lines] == [4.5] * over_steps, title
    labels = json.dumps(by_title["Written answers"])
    for label in ("cross entropy, warm start", "cross entropy, beside rollouts", "reverse KL, beside rollouts"):
        assert label in labels
    assert "After 7 steps, of which 4 were the warm start" in text
    assert re.search(r"</strong> ± [\d.]+ after the warm start", text)
    heads = re.findall(r'<th scope="col">(.*?)</th>', text)
    assert heads[:5] == ["metric, with 95 % interval", "before", "after the warm start", "after", "change"]
    card = (run / "final" / "README.md").read_text()
    assert "| before | after the warm start (4 steps) | after 3 steps |" in card
    assert "- Warm start: 4 steps on written answers (`cross_entropy`), before the first rollout." in card
    assert "- Written answers in the place of rollouts: 0.5 of a step's sequences." in card


def objects(value) -> list[dict]:
    """Every mapping within a value."""
    if isinstance(value, dict):
        return [value, *(found for each in value.values() for found in objects(each))]
    return [found for each in value for found in objects(each)] if isinstance(value, list) else []


def test_a_warm_start_alone_has_its_page_and_table(config, tmp_path, capsys):
    run = Run(load_config(config({"training.max_steps": 0})), Console(width=200), lambda: None)
    assert run.execute() == 0
    said = capsys.readouterr().out
    assert "4 steps of warm start, 0 steps in" in said
    assert "after the warm start" in said
    assert "cross entropy" in said
    charts = {chart.title for chart in run_charts(metrics_of(tmp_path / "run"), run.progress.evaluations)}
    assert {"Reverse KL", "Written answers", "Gradient norm"} <= charts
    assert not {"Completion length", "Fluctuation", "Reverse KL by position"} & charts


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 6])  # within the warm start, at its end, and after it
def test_a_run_that_is_stopped_continues_to_the_same_numbers(config, tmp_path, stop_at):
    changes = {"training.off_policy_fraction": 0.5, "training.eval_every": 2, "training.lr_schedule": "cosine"}
    execute(config(changes | {"training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    path, asked = config(changes), itertools.count(1)
    run = Run(load_config(path), Console(quiet=True), lambda: SIGTERM if next(asked) > stop_at else None)
    assert run.execute() == 143
    assert run.progress.step == stop_at
    execute(path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    for log in ("evaluations", "rollouts", "tokens"):
        one, other = (read_json_lines(tmp_path / name / f"{log}.jsonl") for name in ("whole", "run"))
        assert one == other


def test_other_answers_would_not_continue_truly(config, tmp_path):
    path = config()
    run = Run(load_config(path), Console(quiet=True), lambda: SIGTERM)
    assert run.execute() == 143
    asked = itertools.count(1)
    assert Run(load_config(path), Console(quiet=True), lambda: SIGTERM if next(asked) > 2 else None).execute() == 143
    answered = tmp_path / "answered.jsonl"
    text = answered.read_text()
    answered.write_text(text.replace("grn", "gnr"))
    with pytest.raises(CheckpointError, match=r"the answers in .*answered\.jsonl are others than before"):
        execute(path)
    answered.write_text(text)
    with pytest.raises(CheckpointError, match=r"training\.warm_start: was .*'epochs': 2.*, now .*'epochs': 3"):
        execute(config(epochs=3))
    execute(config())


def test_adapters_alone_are_warmed(config, tmp_path, tiny_pair):
    """With `teacher.model: base` the weights below them stay the teacher's."""
    changes = {"student.lora": {"rank": 4}, "teacher.model": "base"}
    run = execute(config(changes))
    before, warm, after = (each["reverse_kl"] for each in run.progress.evaluations)
    assert before == pytest.approx(0, abs=1e-6)
    assert warm > 1e-3
    assert after != warm


def test_steps_that_are_not_finite_are_skipped_and_named_by_their_own_prompts(config, tmp_path, tiny_pair):
    run = Run(load_config(config({"training.max_bad_steps": 5})), Console(quiet=True), lambda: None)
    embedding = run.parts.student.get_input_embeddings().weight
    embedding.register_hook(lambda grad: grad * math.nan if run.parts.trainer.position.warm == 1 else grad)
    run.execute()
    (event,) = [event for event in events_of(tmp_path / "run") if event["event"] == "skipped"]
    assert event["step"] == 2
    (index,) = run.parts.answers.order(0)[3:]
    assert f"prompts: {run.parts.answers.prompts.texts[index]!r}" in event["message"]
    assert metrics_of(tmp_path / "run")[-1]["skipped_steps"] == 1


def test_the_best_step_is_one_after_it():
    evaluations = [{"step": step, "reverse_kl": kl} for step, kl in ((0, 0.0), (2, 0.5), (4, 0.1), (6, 0.4), (8, 0.3))]
    assert best_step(evaluations, REVERSE_KL) == 4
    assert best_step(evaluations, REVERSE_KL, since=4) == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.warm_start": {}}, "a warm start has either steps or epochs"),
        ({"training.warm_start": {"steps": 1, "epochs": 1}}, "a warm start has either steps or epochs"),
        (
            {"training.warm_start": {"steps": 1, "objectiv": "forward_kl"}},
            "did you mean 'training.warm_start.objective'",
        ),
        ({"training.warm_start": None, "training.max_steps": 0}, "training.max_steps is 0, which is for a warm start"),
        ({"prompts.answers_limit": 3}, "prompts.answers_limit is set, and prompts.answers names no file"),
        ({"training.warm_start": None, "prompts.answers": "a.jsonl"}, "prompts.answers is for training.warm_start"),
        (
            {"training.warm_start": None, "prompts.answer_column": "a"},
            "prompts.answer_column is for training.warm_start",
        ),
        (
            {
                "training.warm_start": {"steps": 1, "objective": "forward_kl"},
                "teacher.server": "http://localhost:1",
                "teacher.server_gives": "sampled",
                "loss.objective": "sampled_reverse_kl",
            },
            "training.warm_start.objective forward_kl compares distributions",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(config, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_config(config(changes))


def test_no_answer_at_all_is_refused_with_where_they_would_be(write_config):
    with pytest.raises(PromptError, match=r"prompts\.train: none of the records in .*prompts\.txt has an answer"):
        execute(write_config({"training.warm_start": {"steps": 1}}))
