"""Talking to a model: the whole command on a tiny one."""

import io

import pytest

from distill.chat import main


def test_lines_are_answered_until_an_empty_one(tiny_pair, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAgain\n\nnever read\n"))
    assert main([str(tiny_pair["student"]), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.count("> ") == 3


def test_a_model_that_is_not_there(capsys):
    assert main(["/nowhere"]) == 2
    assert "'/nowhere': no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["plain words here", "äöü ✓ 漢字 done"])
def test_printed_text_is_the_decoded_completion(text, capsys):
    import torch
    from conftest import tiny_tokenizer

    from distill.chat import _Printer

    tokenizer = tiny_tokenizer()
    printer = _Printer(tokenizer)
    printer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer(text)["input_ids"]:
        printer.put(torch.tensor([token]))
    printer.end()
    assert capsys.readouterr().out == f"{text}\n"
