"""What a run's report, model card, chat and trackers say of its teachers, and of the student's side of the template."""

import io
import json

import pytest
import torch
import yaml
from markupsafe import escape
from test_train import execute

from distill import chat
from distill.config import in_words, load_config
from distill.report.page import report_page
from distill.runtime import read_json_lines

SAID = {
    "student": (
        "template arguments {'opening': 'Well, '}",
        "system prompt “Be kind.”",
        "completions end on <|end|>, 7",
    ),
    "teacher": (
        "base",
        "follows the student (ema:0.5); evaluations are against that of step 0",
        "as “{{ prompt }} ({{",
    ),
    "teacher b": ("weights in float32", "system prompt “Be brief.”", "sees each record's hint"),
}


@pytest.fixture
def told(write_config, tiny_pair, tmp_path):
    """The folder of a run in which teachers see what the student does not, one follows it, and records mix them."""
    pytest.importorskip("tensorboard")
    for kind, words in (("train", ("red", "blue")), ("eval", ("pink", "grey"))):
        teacher = {words[0]: {"main": 0.25, "b": 0.75}, words[1]: "b"}
        records = [
            {"prompt": f"Say {word}.", "answer": word, "hint": f"{word}!", "teacher": teacher[word]} for word in words
        ]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {
        "student.chat_template_kwargs": {"opening": "Well, "},
        "prompts.system_prompt": "Be kind.",
        "prompts.train": str(tmp_path / "train.jsonl"),
        "prompts.eval": str(tmp_path / "eval.jsonl"),
        "rollout.stop_ids": ["<|end|>", 7],
        "teacher.model": "base",
        "teacher.update": "ema:0.5",
        "teacher.prompt_template": "{{ prompt }} ({{ answer }})",
        "teacher.others": {
            "b": {
                "model": str(tiny_pair["teacher"]),
                "precision": "float32",
                "system_prompt": "Be brief.",
                "column": "hint",
            }
        },
        "training.report_to": ["tensorboard"],
    }
    execute(write_config(changes))
    return tmp_path / "run"


def test_report_card_and_trackers_say_what_the_teachers_were(told):
    words = in_words(load_config(told / "config.yaml"))
    assert set(words) == set(SAID)
    page, card = report_page(told), (told / "final" / "README.md").read_text()
    assert "teacher has a prompt of its own for 1 of 1 prompts" in page
    assert "teacher.others.b has a prompt of its own for 2 of 2 prompts" in page
    for who, parts in SAID.items():
        assert f'<th scope="row">{who}</th><td>{escape(words[who])}</td>' in page
        assert f"- {who}: " in card
        for part in parts:
            assert part in words[who]
    assert "follows the student" in card
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = EventAccumulator(str(told / "tensorboard"), size_guidance={"tensors": 0})
    tracked.Reload()
    lines = read_json_lines(told / "evaluations.jsonl")
    for name, tag in (("main 0.25, b 0.75", "main 0.25_ b 0.75"), ("b", "b")):
        assert f'<th scope="row">{name}</th>' in page
        kl = [line["by_teacher"][name]["reverse_kl"] for line in lines]
        assert [event.value for event in tracked.Scalars(f"eval/reverse_kl/{tag}")] == pytest.approx(kl)
    sums, tokens = (torch.tensor(lines[-1]["clusters"][key]) for key in ("sums", "tokens"))
    assert kl[-1] == pytest.approx(float(sums[1] / tokens[1]))  # of the second prompt
    (text,) = tracked.Tensors("config/text_summary")[0].tensor_proto.string_val
    kept = json.loads(text.decode().strip("`\n"))
    assert kept == yaml.safe_load((told / "config.yaml").read_text())


def test_in_a_chat_each_model_sees_what_it_saw_in_the_run(told, monkeypatch, capsys):
    seen, real = [], chat.tokenise
    monkeypatch.setattr(
        chat,
        "tokenise",
        lambda messages, *rest, **more: seen.append((list(messages), more)) or real(messages, *rest, **more),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    monkeypatch.setenv("COLUMNS", "160")
    assert chat.main([str(told), "--max-new-tokens", "3", "--temperature", "0"]) == 0
    text = capsys.readouterr().out
    assert "teacher: sees what you write, without the records' answer" in text
    assert "teacher b" in text
    assert [messages[0]["content"] for messages, _ in seen] == ["Be kind."] * 3 + ["Be brief."]
    assert all(arguments == {"opening": "Well, "} for _, arguments in seen)


def test_in_a_chat_a_template_of_the_line_alone_is_what_the_teacher_sees(write_config, tmp_path, monkeypatch):
    changes = {"teacher.prompt_template": "{{ prompt }} Be brief.", "training.max_steps": 1, "prompts.eval": None}
    execute(write_config(changes))
    seen, real = [], chat.tokenise
    monkeypatch.setattr(
        chat, "tokenise", lambda messages, *rest, **more: seen.append(list(messages)) or real(messages, *rest, **more)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert chat.main([str(tmp_path / "run"), "--max-new-tokens", "3"]) == 0
    assert [messages[-1]["content"] for messages in seen] == ["Hello", "Hello", "Hello Be brief."]
