"""Talking to one model and to the three of a run: the whole command on tiny ones."""

import io

import pytest
from test_train import execute

from distill import chat
from distill.chat import main

SHORT = ("--max-new-tokens", "5", "--temperature", "0")


def say(monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_lines_are_answered_until_an_empty_one(tiny_pair, monkeypatch, capsys):
    say(monkeypatch, "Hello\nAgain\n\nnever read\n")
    assert main([str(tiny_pair["student"]), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.count("> ") == 3


@pytest.mark.parametrize(
    ("changes", "teacher"),
    [
        ({"student.drop_layers": [1]}, "qwen3"),
        ({"student.drop_layers": "auto:1", "student.lora": {"rank": 2}, "teacher.model": "base"}, "llama"),
    ],
)
def test_the_three_models_of_a_run_answer_side_by_side(write_config, tmp_path, monkeypatch, capsys, changes, teacher):
    execute(write_config({**changes, "training.learning_rate": 0.1}))
    asked = []
    real = chat.Speaker.answer

    def answer(self, line):
        asked.append((self.model.config.num_hidden_layers, self.model.config.model_type, list(self.messages)))
        asked[-1] += (text := real(self, line),)
        return text

    monkeypatch.setattr(chat.Speaker, "answer", answer)
    monkeypatch.setenv("COLUMNS", "120")
    say(monkeypatch, "Count to three.\nAnd on?\n")
    assert main([str(tmp_path / "run"), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("student before" in line and "student after" in line and "teacher" in line for line in lines) == 2
    assert [models[:2] for models in asked] == [(2, "llama"), (2, "llama"), (3, teacher)] * 2
    before, after, teacher = (models[3] for models in asked[:3])
    assert len({before, after, teacher}) == 3  # the learning rate is high
    for first, second in zip(asked[:3], asked[3:], strict=True):  # each continues its own conversation
        assert [message["content"] for message in second[2]] == ["Count to three.", first[3]]
    assert main([str(tmp_path / "run" / "final"), *SHORT]) == 0


def test_a_narrow_terminal_gets_the_answers_below_each_other(write_config, tmp_path, monkeypatch, capsys):
    execute(write_config({"training.max_steps": 1, "prompts.eval": None}))
    monkeypatch.setenv("COLUMNS", "40")
    say(monkeypatch, "Hello\n")
    assert main([str(tmp_path / "run"), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [
        i for i, line in enumerate(lines) if any(n in line for n in ("student before", "student after", "teacher"))
    ]
    assert len(titles) == 3
    assert all(len(line.removeprefix("> ")) <= 40 for line in lines)


def test_the_teacher_sees_the_prompt_that_it_had_in_the_run(write_config, tmp_path, monkeypatch, capsys):
    execute(write_config({"training.max_steps": 1, "prompts.eval": None, "teacher.system_prompt": "Be brief."}))
    seen = []
    real = chat.tokenise
    monkeypatch.setattr(
        chat, "tokenise", lambda messages, *rest, **more: seen.append(list(messages)) or real(messages, *rest, **more)
    )
    say(monkeypatch, "Hello\n")
    assert main([str(tmp_path / "run"), *SHORT]) == 0
    assert [messages[0]["role"] for messages in seen] == ["user", "user", "system"]


def test_a_model_that_is_not_there(capsys):
    assert main(["/nowhere"]) == 2
    assert "'/nowhere': no such directory" in capsys.readouterr().err


def test_a_run_that_is_not_finished_or_whose_models_are_gone(write_config, tmp_path, capsys):
    execute(write_config({"training.max_steps": 1, "prompts.eval": None}))
    run = tmp_path / "run"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("model:", "model: /gone/model #", 1))
    assert main([str(run)]) == 2
    assert "'/gone/model': no such directory" in capsys.readouterr().err
    (run / "final").rename(run / "elsewhere")
    assert main([str(run)]) == 2
    assert "without final/" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan")])
def test_options_that_mean_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["model", *option])
    assert ended.value.code == 2
    assert "or more, found" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["plain words here", "äöü ✓ 漢字 done", "a\x1b[2Jb\x9bc"])
def test_printed_text_is_the_decoded_completion_without_commands_to_the_terminal(text, capsys):
    import torch
    from conftest import tiny_tokenizer

    from distill.chat import _Printer

    tokenizer = tiny_tokenizer()
    printer = _Printer(tokenizer)
    printer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer(text)["input_ids"]:
        printer.put(torch.tensor([token]))
    printer.end()
    assert capsys.readouterr().out == text.replace("\x1b", "\ufffd").replace("\x9b", "\ufffd") + "\n"
