"""The student's side of the chat template: its arguments, a system prompt, a template file, and a run with all."""

import json

import pytest
from conftest import CHAT_TEMPLATE, tiny_tokenizer
from test_chat import SHORT, say
from test_ends import STOPS, unlike  # noqa: F401 (a fixture)
from test_train import assert_same_run, execute, main
from transformers import AutoTokenizer

from distill import chat
from distill.prompts import PromptError, load_prompts, read_template

FILE_TEMPLATE = "{% if shout %}!{% endif %}" + CHAT_TEMPLATE.replace("<|start|>", "<|unknown|>")


@pytest.fixture
def load(tmp_path):
    def read(*records, tokenizer=None, **options):
        path = tmp_path / "some.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_prompts(path, tokenizer or tiny_tokenizer(), **options)

    return read


def test_a_system_prompt_is_for_conversations_without_one(load):
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Say blue."}]
    prompts = load({"prompt": "Say red."}, {"messages": own}, system_prompt="Be <|end|> brief.")
    decode = tiny_tokenizer().decode
    assert decode(prompts.token_ids[0]).startswith("<|start|>system\nBe <|end|> brief.<|end|>\n<|start|>user\nSay red.")
    assert prompts.token_ids[0].count(2) == 2  # what it spells out stays text
    assert prompts.messages[0] == [
        {"role": "system", "content": "Be <|end|> brief."},
        {"role": "user", "content": "Say red."},
    ]
    assert prompts.messages[1] == own
    assert prompts.token_ids[1] == load({"messages": own}).token_ids[0]


def test_template_arguments_reach_the_students_template(load):
    ids = load({"prompt": "Say red."}, chat_template_kwargs={"opening": "Well, "}).token_ids[0]
    assert tiny_tokenizer().decode(ids).endswith("<|start|>assistant\nWell, ")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"system_prompt": "Be brief."}, "prompts.system_prompt"),
        ({"chat_template_kwargs": {"opening": "a"}}, "student.chat_template_kwargs"),
    ],
)
def test_without_a_template_they_are_refused(load, options, key):
    with pytest.raises(PromptError, match=f"{key}: needs a chat template, and prompts.chat_template is never"):
        load({"prompt": "a"}, chat_template="never", **options)
    with pytest.raises(PromptError, match=f"{key}: needs a chat template, and the student's tokenizer has none"):
        load({"prompt": "a"}, tokenizer=tiny_tokenizer(chat_template=None), **options)


@pytest.mark.parametrize("name", ["special", "tokenizer", "tokenize", "tools", "messages", "continue_final_message"])
def test_arguments_that_mean_something_else_here_are_refused(load, name):
    with pytest.raises(PromptError, match=r"student.chat_template_kwargs|line 1: this prompt cannot be tokenised"):
        load({"prompt": "a"}, chat_template_kwargs={name: True})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no such file"),
        (b"\xff", r"not UTF-8 text \(byte 0\): save it as UTF-8"),
        (b"\n{% for m in messages %}", ", line 2: not a valid Jinja template: Unexpected end of template"),
        (b"{{ x | nothing }}", ", line 1: not a valid Jinja template: No filter named 'nothing'"),
    ],
)
def test_a_file_that_is_no_template_is_refused_before_models_are_loaded(
    write_config, tmp_path, capsys, content, expected
):
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=rf"prompts.chat_template: .*chat\.jinja.*{expected}"):
        read_template(path)
    config = write_config({"prompts.chat_template": str(path), "student.model": "/nowhere"})
    assert main(["--config", str(config)]) == 2
    assert f"prompts.chat_template: {path}" in capsys.readouterr().err


def test_the_dialect_of_chat_templates_is_known(tmp_path):
    text = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(text)
    assert read_template(tmp_path / "chat.jinja") == text


@pytest.fixture
def everything(tmp_path, unlike):  # noqa: F811
    """All that the student's side of the template has, and ends that neither model has, as changes."""
    (tmp_path / "chat.jinja").write_text(FILE_TEMPLATE)
    rows = [{"prompt": f"Say {word}."} for word in ("red", "green", "blue", "grey", "pink")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **unlike,
        "student.chat_template_kwargs": {"shout": True, "opening": "Oh, "},
        "prompts.system_prompt": "Be brief.",
        "prompts.chat_template": str(tmp_path / "chat.jinja"),
        "prompts.train": str(tmp_path / "rows.jsonl"),
        "rollout.stop_ids": STOPS,
        "rollout.max_new_tokens": 12,
    }


SEEN = "!<|unknown|>system\nBe brief.<|end|>\n<|unknown|>user\nSay red.<|end|>\n<|unknown|>assistant\nOh, "


def test_a_run_with_all_of_it_continues_to_the_same_numbers_and_notices_what_changes(
    write_config, everything, tmp_path, capsys
):
    whole = write_config({**everything, "training.output_dir": str(tmp_path / "whole")}, "whole.yaml")
    run = execute(whole)
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(run.parts.prompts.student.token_ids[0]) == SEEN
    path = write_config(everything)
    for steps in ("2", "5"):
        assert main(["--config", str(path), "--training.max_steps", steps]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    final = tmp_path / "run" / "final"
    assert AutoTokenizer.from_pretrained(final).chat_template == FILE_TEMPLATE
    assert json.loads((final / "generation_config.json").read_text())["eos_token_id"] == STOPS
    capsys.readouterr()
    # Another text under the same name, and another template in the same file.
    longer = [str(path), "--training.num_epochs", "2"]
    rows, template = tmp_path / "rows.jsonl", tmp_path / "chat.jinja"
    said = f"prompts.train: the column 'prompt' of {rows} holds something else than before"
    for file, new in ((rows, rows.read_text().replace("red", "RED")), (template, FILE_TEMPLATE + " ")):
        old = file.read_text()
        file.write_text(new)
        assert main(["--config", *longer]) == 2
        assert said in capsys.readouterr().err
        file.write_text(old)
    assert main(["--config", *longer]) == 0


def test_the_teachers_own_prompt_is_in_the_file_s_template(write_config, everything):
    run = execute(
        write_config(
            {**everything, "teacher.chat_template_kwargs": {"opening": "So, "}, "training.max_steps": 1},
        )
    )
    assert tiny_tokenizer().decode(run.parts.prompts.teacher.seen[0][0][0]) == SEEN.replace("Oh", "So")


def test_chat_speaks_as_the_run_did(write_config, everything, tmp_path, monkeypatch, capsys):
    execute(write_config({**everything, "training.max_steps": 1, "prompts.eval": None}))
    asked, real = [], chat.Speaker.answer

    def answer(self, line):
        generate = self.model.generate
        self.model.generate = lambda prompt, **more: asked.append((prompt, more)) or generate(prompt, **more)
        return real(self, line)

    monkeypatch.setattr(chat.Speaker, "answer", answer)
    say(monkeypatch, "Say red.\n")
    assert chat.main([str(tmp_path / "run"), *SHORT]) == 0
    assert [tiny_tokenizer().decode(prompt[0]) for prompt, _ in asked] == [SEEN] * 3
    assert [more["eos_token_id"] for _, more in asked] == [STOPS] * 3
