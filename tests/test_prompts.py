"""Prompt files: what is read, what is left out and counted, what is refused; the template; the order."""

import json
from pathlib import Path

import pytest
from conftest import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.prompts import PromptError, epoch_order, left_pad, load_prompts

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture
def load(tmp_path):
    def read(content, name="prompts.txt", tokenizer=None, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_prompts(path, tokenizer or tiny_tokenizer(), **options)

    return read


def test_one_prompt_a_line_in_the_chat_template(load):
    tokenizer = tiny_tokenizer()
    prompts = load("Hello.\r\n\n  Two words \n", tokenizer=tokenizer)
    assert prompts.texts == ["Hello.", "Two words"]
    assert prompts.empty == 1
    assert tokenizer.decode(prompts.token_ids[0]) == "<|start|>user\nHello.<|end|>\n<|start|>assistant\n"


def test_template_gives_the_ids_that_the_tokenizer_itself_gives(load):
    tokenizer = tiny_tokenizer()
    own = tokenizer.apply_chat_template([{"role": "user", "content": "Hi, you!"}], add_generation_prompt=True)
    assert load("Hi, you!\n", tokenizer=tokenizer).token_ids == [own["input_ids"]]


def test_without_a_template_the_text_is_taken_as_it_is(load):
    tokenizer = tiny_tokenizer(chat_template=None)
    assert tokenizer.decode(load("Once upon", tokenizer=tokenizer).token_ids[0]) == "Once upon"
    assert tiny_tokenizer().decode(load("Once upon", chat_template="never").token_ids[0]) == "Once upon"


def test_json_lines_with_prompts_and_conversations(load):
    talk = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    lines = [{"prompt": "One\nprompt"}, {"messages": talk}]
    prompts = load("\n".join(map(json.dumps, lines)), "prompts.jsonl")
    assert prompts.texts == ["One\nprompt", "USER"]
    assert tiny_tokenizer().decode(prompts.token_ids[1]).startswith("<|start|>system\nSYSTEM<|end|>\n<|start|>user\n")


def test_conversations_and_their_teachers_are_kept_beside_the_ids_of_the_prompts_that_are_used(load):
    talk = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    lines = [{"prompt": " "}, {"prompt": "One", "teacher": "code"}, {"messages": talk}, {"prompt": "x" * 99}]
    prompts = load("\n".join(map(json.dumps, lines)), "prompts.jsonl", max_tokens=90)
    assert prompts.messages == [[{"role": "user", "content": "One"}], talk]
    assert prompts.teachers == ["code", None]
    assert (len(prompts), prompts.empty, prompts.too_long) == (2, 1, 1)
    plain = load("One\nTwo\n")
    assert plain.teachers == [None, None]
    named = load('{"prompt": "One"}\n{"prompt": "Two", "teacher": "code"}', "prompts.jsonl")
    assert named.token_ids == plain.token_ids
    assert named.digest != plain.digest


@pytest.mark.parametrize("template", ["auto", "never"])
def test_control_tokens_written_as_text_stay_text(load, template):
    tokenizer = tiny_tokenizer()
    text = "say <|end|> then <|start|>system<|end|> twice"
    ids = load(text, tokenizer=tokenizer, chat_template=template).token_ids[0]
    plain = load("say nothing", tokenizer=tokenizer, chat_template=template).token_ids[0]
    assert [i for i in ids if i < 4] == [i for i in plain if i < 4]
    assert text in tokenizer.decode(ids)


def test_what_is_too_long_or_empty_is_counted(load):
    prompts = load("short\n" + "long " * 50 + "\n\n   \n", max_tokens=60)
    assert (len(prompts), prompts.too_long, prompts.empty) == (1, 1, 2)
    assert load('{"prompt": ""}\n{"prompt": "x"}\n', "p.jsonl").empty == 1


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("", "p.txt", "no usable prompt (1 empty"),
        ("\n \n", "p.txt", "2 empty"),
        (b"\xff\xfe\x00bad", "p.txt", "not UTF-8 text (byte 0)"),
        ("{", "p.jsonl", "line 1: not valid JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', "p.jsonl", "line 2: expected"),
        ('{"messages": [{"role": "king<|end|>", "content": "b"}]}', "p.jsonl", "with a role of"),
        ("[1]", "p.jsonl", "line 1: expected"),
        ("a", "p.xlsx", "is none of the kinds that are read; prompts are in .txt (one prompt a line), .jsonl"),
        (b"text\0more", "p.txt", "byte 4 is NUL, so this is no text file"),
        (b"\x7fELF\x02\x01\x01" + b"\0" * 64, "p.txt", "NUL"),
        (b"fine\ncaf\xe9\n", "p.txt", "not UTF-8 text (byte 8): save it as UTF-8"),
        ("Grüße".encode("utf-16"), "p.txt", "not UTF-8 text (byte 0)"),
        ("[" * 100_000, "p.jsonl", "line 1: not valid JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "p.jsonl", "line 1: "),
        ('{"prompt": "half a pair: \\ud800"}', "p.jsonl", "line 1: this prompt cannot be tokenised"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "p.jsonl", "with a role of"),
        ('{"messages": "x"}', "p.jsonl", "expected"),
        (
            '{"prompt": "x", "teacher": 3}',
            "p.jsonl",
            "line 1: expected a teacher's name as text, or names",
        ),
        ("{}", "p.jsonl", "line 1: expected in a column `prompt` or `messages`"),
        ("mark \U000f0d15 <|end|>", "p.txt", "private-use characters"),
    ],
)
def test_refused_files_are_named_with_the_reason(load, content, name, expected):
    with pytest.raises(PromptError) as caught:
        load(content, name)
    assert expected in str(caught.value)
    assert name in str(caught.value)


def test_control_tokens_are_tokens_where_that_is_asked_for(load):
    text = "<|start|>user Hi<|end|>"
    ids = load(text, chat_template="never", control_tokens="special").token_ids[0]
    assert [i for i in ids if i < 4] == [1, 2]
    assert [i for i in load(text, chat_template="never").token_ids[0] if i < 4] == []


def test_a_template_that_refuses_a_conversation_is_quoted(load):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users begin') }}{% endif %}x"
    line = json.dumps({"messages": [{"role": "system", "content": "a"}]})
    with pytest.raises(PromptError, match=r"line 1: this prompt cannot be tokenised: users begin"):
        load(line, "p.jsonl", tokenizer=tiny_tokenizer(chat_template=strict))
    with pytest.raises(PromptError, match="line 1: this prompt cannot be tokenised"):
        load(line, "p.jsonl", tokenizer=tiny_tokenizer(chat_template="{{ messages[0]"))


def test_a_line_longer_than_any_prompt_is_left_out_without_being_tokenised(load):
    megabytes = "é" * 2**22 + "\n"
    prompts = load("short\n" + megabytes * 2 + '{"prompt": "last"}', max_tokens=100)
    assert (len(prompts), prompts.too_long) == (2, 2)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # takes no room on the disk
    with pytest.raises(PromptError, match=r"huge\.txt: 3\.0 GiB, and at most 1 are read"):
        load_prompts(path, tiny_tokenizer())


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode), st.sampled_from([".txt", ".jsonl"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_prompts_or_refused(tmp_path, content, suffix):
    path, refusal = tmp_path / f"fuzz{suffix}", ""
    path.write_bytes(content)
    try:
        prompts = load_prompts(path, tiny_tokenizer())
        assert all(prompts.token_ids)
    except PromptError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith(str(path))


def test_conversation_without_a_template_is_refused(load):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(PromptError, match="needs a chat template"):
        load(json.dumps({"messages": talk}), "p.jsonl", tokenizer=tiny_tokenizer(chat_template=None))


def test_missing_file(tmp_path):
    with pytest.raises(PromptError, match="no such file"):
        load_prompts(tmp_path / "absent.txt", tiny_tokenizer())


def test_padding_is_on_the_left():
    ids, mask = left_pad([[5], [6, 7, 8]], 0)
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]


def test_order_depends_on_seed_and_epoch_alone():
    orders = [epoch_order(50, seed=s, epoch=e, shuffle=True) for s, e in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert epoch_order(3, seed=0, epoch=5, shuffle=False) == [0, 1, 2]


def test_shipped_prompts_are_many_varied_and_held_out():
    train, held_out = ((DATA / name).read_text().splitlines() for name in ("prompts.txt", "eval.txt"))
    assert len(set(train)) == len(train) >= 200
    assert len(set(held_out)) == len(held_out) >= 24
    assert not set(train) & set(held_out)
