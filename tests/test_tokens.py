"""Tokenising prompts: what was done one prompt and one token at a time, in few calls of the tokenizer."""

import io
import json
import time
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from distill.prompts import PromptError, load_prompts, tokenise
from distill.prompts import prompt_set as prompt_sets
from distill.prompts.tokens import ControlTokens
from distill.run import display

DATA = Path(__file__).parent.parent / "data"
MARKS = "\U000f0d15", "\U000f0d16"
# Some begin with, end with or hold one another; one begins with a letter, one has a line feed.
CLASHING = ["<unused1>x", "<unused12", "unused1>", "<<unused1>>", "a<", "<\n>", "[x]", "[x][x]", "é"]


def many_tokens():
    """The byte-level tokenizer with as many special tokens as some real ones have."""
    tokenizer = tiny_tokenizer()
    spelled = [f"<unused{i}>" for i in range(6400 - len(CLASHING))] + CLASHING
    tokenizer.add_special_tokens({"additional_special_tokens": spelled})
    assert len(tokenizer.added_tokens_decoder) == 6404
    return tokenizer


MANY, FEW = many_tokens(), tiny_tokenizer()
CONTROL = ControlTokens([token.content for token in MANY.added_tokens_decoder.values() if token.special])


def one_at_a_time(messages, tokenizer, templated):
    """The oracle: a search for every token, and a call of the tokenizer for every piece."""
    hidden = []
    safe = [{**message, "content": _hide(message["content"], tokenizer, hidden)} for message in messages]
    if templated:
        text = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
    else:
        text = safe[-1]["content"]
    ids = tokenizer(text.split(_mark(0))[0] if hidden else text, add_special_tokens=not templated)["input_ids"]
    for index, spelled in enumerate(hidden):
        ids += tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        rest = text.split(_mark(index))[1].split(_mark(index + 1))[0]
        ids += tokenizer(rest, add_special_tokens=False)["input_ids"]
    return ids


def _mark(index: int) -> str:
    return f"{MARKS[0]}{index}{MARKS[1]}"


def _hide(content: str, tokenizer, hidden: list[str]) -> str:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    while True:
        found = [(content.find(token), -len(token), token) for token in special if token and token in content]
        if not found:
            return content
        token = min(found)[2]
        content = content.replace(token, _mark(len(hidden)), 1)
        hidden.append(token)


def conversations(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


PIECES = ["<", ">", "<unused", "1", "2>", "x", "é", "a", " ", "\n", "[x]", "<|end|>", "<|start|>", "<|pad", *CLASHING]


@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_ids_are_those_of_one_search_and_one_call_at_a_time(texts):
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    for tokenizer in (MANY, FEW):
        assert tokenise(messages, tokenizer, True) == one_at_a_time(messages, tokenizer, True)
        assert tokenise(messages[:1], tokenizer, False) == one_at_a_time(messages[:1], tokenizer, False)


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=60, deadline=None)
def test_the_earliest_and_of_those_the_longest_token_is_hidden_first(text):
    """The byte-level tokenizer gives the same ids wherever a text is cut; others do not."""
    ours, theirs = [], []
    assert CONTROL.hide(text, ours) == _hide(text, MANY, theirs)
    assert ours == theirs


def test_the_ids_of_all_shipped_prompts_are_the_same(tmp_path):
    lines = [line.strip() for path in DATA.glob("*.txt") for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) > 240
    # Among prompts that hide nothing some that do, and batches of more than one size.
    for at in range(0, len(lines), 7):
        lines[at] += f" <unused{at}> and <unused1>x<|end|>"
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines))
    for tokenizer in (MANY, FEW):
        expected = [one_at_a_time(messages, tokenizer, True) for messages in conversations(*lines)]
        assert load_prompts(path, tokenizer).token_ids == expected


def test_the_tokenizer_is_called_for_many_prompts_at_once_and_asked_for_its_tokens_once(tmp_path, monkeypatch):
    tokenizer, path = many_tokens(), tmp_path / "prompts.txt"
    path.write_text("".join(f"Prompt {i} of <unused{i % 10}> many.\n" for i in range(1000)))
    calls, kind = [], type(tokenizer)
    call, decoder = kind.__call__, kind.added_tokens_decoder
    monkeypatch.setattr(kind, "__call__", lambda self, *args, **more: calls.append("call") or call(self, *args, **more))
    monkeypatch.setattr(kind, "added_tokens_decoder", property(lambda self: calls.append("list") or decoder.fget(self)))
    assert len(load_prompts(path, tokenizer)) == 1000
    assert calls.count("list") == 1
    assert calls.count("call") == 3 * -(-1000 // prompt_sets.BATCH)


def test_thousands_of_special_tokens_cost_no_multiple_of_the_tokenizers_own_work(tmp_path):
    """Twice is the aim; the bound leaves room for other work on the machine. It was thirty times."""
    path = tmp_path / "prompts.txt"
    lines = [f"A <b>prompt</b> of some length, number {i}, a<b> and so on." for i in range(1000)]
    path.write_text("\n".join(lines))

    def least_seconds(work) -> float:
        found = []
        for _ in range(3):
            began = time.process_time()
            work()
            found.append(time.process_time() - began)
        return min(found)

    own = least_seconds(lambda: MANY.apply_chat_template(conversations(*lines), add_generation_prompt=True))
    assert least_seconds(lambda: load_prompts(path, MANY)) < 5 * own


def test_of_two_faults_the_first_in_the_file_is_told(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": "half: \\ud800"}\n{"prompt": "fine"}\n{"text": "no prompt"}\n')
    with pytest.raises(PromptError, match="line 2: this prompt cannot be tokenised"):
        load_prompts(path, MANY)
    path.write_text('{"prompt": "fine"}\n{"text": "no prompt"}\n{"prompt": "half: \\ud800"}\n')
    with pytest.raises(PromptError, match="line 2: expected"):
        load_prompts(path, MANY)


def test_spelled_out_tokens_of_a_message_that_the_template_leaves_out_or_repeats():
    messages = [{"role": role, "content": f"{role} <|end|>!"} for role in ("user", "assistant", "user")]
    last, twice = tiny_tokenizer(), tiny_tokenizer()
    last.chat_template = "{{ messages[-1]['content'] }}"
    twice.chat_template = "{{ messages[-1]['content'] }}{{ messages[-1]['content'] }}"
    assert last.decode(tokenise(messages, last, True)) == "user <|end|>!"
    assert tokenise(messages, twice, True) == 2 * tokenise(messages, last, True)


def test_tokens_and_templates_that_come_later_are_known():
    tokenizer, messages = tiny_tokenizer(), conversations("say <later>")[0]
    before = tokenise(messages, tokenizer, True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<later>"]})
    assert tokenise(messages, tokenizer, True) == before
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer.decode(tokenise(messages, tokenizer, True)) == "say <later>"


def test_a_template_that_reads_parts_gets_parts():
    """As those of many models of pictures do, which leave out a text that is no list of parts."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}",
    )
    assert tokenizer.chat_template != CHAT_TEMPLATE
    messages = conversations("Say <|end|> twice.")[0]
    assert tokenise(messages, tokenizer, True) == tokenise(messages, FEW, True)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("patience", [-1.0, 60.0])
def test_what_takes_long_says_how_far_it_is(tmp_path, monkeypatch, terminal, patience):
    monkeypatch.setattr(display, "PATIENCE", patience)
    path, console = tmp_path / "p.jsonl", Console(file=io.StringIO(), force_terminal=terminal, width=200)
    path.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(300)))
    with display.counting(console, f"reading {path.name}") as watched:
        assert len(load_prompts(path, FEW, watched=watched)) == 300
    assert ("reading p.jsonl" in console.file.getvalue()) == (patience < 0)
    assert ("(0 so far)" in console.file.getvalue()) == (patience < 0 and not terminal)
