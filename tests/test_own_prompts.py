"""A prompt of the teacher's own for each record: from a column, from a template, or the student's."""

import json

import pytest
from conftest import tiny_tokenizer
from test_teachers import ids_of, prompt_set, seen_by, teachers_named  # noqa: F401 (a fixture among them)
from test_train import assert_same_run, execute

from distill.prompts import PromptError
from distill.train import main

USER = "<|start|>user\n{}<|end|>\n<|start|>assistant\n"


def text_of(seen, index: int) -> str:
    return tiny_tokenizer().decode(ids_of(seen, index))


@pytest.mark.parametrize(("column", "settings"), [("teacher_prompt", {}), ("hint", {"column": "hint"})])
def test_a_column_holds_what_the_teacher_sees(prompt_set, column, settings):  # noqa: F811
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}]
    prompts = prompt_set(
        {"prompt": "Say red.", column: "Say red. It is a colour <|end|>."},
        {"messages": conversation, column: "1 + 1 is 2"},
        {"prompt": "1 + 1", column: [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}]},
        {"prompt": "Say blue.", column: None},
        {"prompt": "Say grey.", column: " "},
    )
    seen = seen_by(prompts, teachers_named(None, **settings))
    assert text_of(seen, 0) == USER.format("Say red. It is a colour <|end|>.")
    assert ids_of(seen, 0).count(2) == 1  # the template's: what the record spells out stays text
    assert text_of(seen, 1) == "<|start|>system\nBe brief.<|end|>\n" + USER.format("1 + 1 is 2")
    assert text_of(seen, 2) == "<|start|>user\nOne<|end|>\n" + USER.format("Two")
    assert ids_of(seen, 3) is prompts.token_ids[3]
    assert ids_of(seen, 4) is prompts.token_ids[4]
    assert seen.columns == (column,)
    assert seen.remarks == ("teacher has a prompt of its own for 3 of 5 prompts; for 2 it sees what the student sees",)


def test_records_without_such_a_column_need_no_view(prompt_set):  # noqa: F811
    assert seen_by(prompt_set({"prompt": "Say red."}), teachers_named(None)) is None


def test_a_template_writes_the_last_turn_from_the_records_columns(prompt_set):  # noqa: F811
    prompts = prompt_set(
        {"prompt": "1 + 1", "answer": {"short": 2}},
        {
            "prompt": [{"role": "user", "content": "Hello"}, {"role": "user", "content": "2 + 2"}],
            "answer": {"short": 4},
        },
        {"prompt": "3 + 3", "answer": None},
    )
    template = "{% if answer is defined %}{{ prompt }} ({{ answer.short }}){% endif %}"
    seen = seen_by(prompts, teachers_named(None, prompt_template=template))
    assert text_of(seen, 0) == USER.format("1 + 1 (2)")
    assert text_of(seen, 1) == "<|start|>user\nHello<|end|>\n" + USER.format("2 + 2 (4)")
    assert ids_of(seen, 2) is prompts.token_ids[2]
    assert seen.columns == ("answer",)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prompt_template": "{{ answr }}"}, "prompt 'Say red.': teacher.prompt_template: 'answr' is undefined"),
        ({"prompt_template": "a\n{{ answer"}, "teacher.prompt_template, line 2: no Jinja template"),
        ({"prompt_template": "{{ answer.__class__.__mro__ }}"}, "unsafe"),
        ({"prompt_template": "{{ answer.append(1) }}"}, "unsafe"),
        ({"prompt_template": "{{ prompt / 2 }}"}, "unsupported operand"),
        ({"column": "hint"}, "teacher.column: none of the records has a prompt in 'hint'; they have answer, prompt"),
        ({"column": "answer"}, "expected in the column 'answer' text or a list"),
        ({"column": "said"}, "it ends in an answer"),
    ],
)
def test_what_gives_no_prompt_is_refused_with_the_record(prompt_set, settings, expected):  # noqa: F811
    record = {"prompt": "Say red.", "answer": [1]}
    if settings.get("column") == "said":
        record["said"] = [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": "Red."}]
    with pytest.raises(PromptError) as error:
        seen_by(prompt_set(record), teachers_named(None, **settings))
    assert expected in str(error.value)


def test_arguments_of_the_students_template_hold_for_what_the_teacher_sees_unless_it_has_its_own(prompt_set):  # noqa: F811
    prompts = prompt_set({"prompt": "Say red.", "teacher_prompt": "Say blue."})
    arguments = {"template_arguments": {"opening": "Well, "}}
    seen = seen_by(prompts, teachers_named(None), **arguments)
    assert text_of(seen, 0) == USER.format("Say blue.") + "Well, "
    own = teachers_named(None, chat_template_kwargs={"opening": "So, "})
    assert text_of(seen_by(prompts, own, **arguments), 0) == USER.format("Say blue.") + "So, "


def test_what_the_teachers_see_has_a_digest(prompt_set):  # noqa: F811
    prompts = prompt_set({"prompt": "Say red.", "a": "one", "b": "two"})
    one, same, other = (seen_by(prompts, teachers_named(None, column=column)).digest for column in ("a", "a", "b"))
    assert one == same != other


@pytest.fixture
def privileged(write_config, tiny_pair, tmp_path):
    """Writes the configuration of a run of four records: prompts of the teachers' own, and a mixture of teachers."""

    def write(changes=None, answer="it is", name="config.yaml"):
        records = [
            {
                "prompt": f"Say {word}.",
                "answer": f"{answer} {word}",
                "teacher": {"main": 0.25, "b": 0.75} if at % 2 else None,
                "note": "not used",
            }
            for at, word in enumerate(("red", "blue", "grey", "pink"))
        ]
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = {
            "prompts.train": str(tmp_path / "records.jsonl"),
            "teacher.prompt_template": "{{ prompt }} {{ answer }}",
            "teacher.others": {"b": {"model": str(tiny_pair["student"]), "system_prompt": "Be brief."}},
            "prompts.eval": None,
            "training.prompts_per_step": 2,
            "training.num_epochs": 2,
            "training.save_every": 1,
        }
        return write_config(settings | (changes or {}), name)

    return write


def test_a_run_with_a_mixture_continues_to_the_same_numbers_and_refuses_changed_columns(privileged, tmp_path, capsys):
    execute(privileged({"training.output_dir": str(tmp_path / "whole")}, name="whole.yaml"))
    execute(privileged({"training.max_steps": 1}))
    path = privileged()
    records = (tmp_path / "records.jsonl").read_text()
    for old, new, named in (
        ("it is red", "it is blue", "the column 'answer'"),
        ('"b": 0.75', '"b": 0.7499999', "the column 'teacher'"),
        ("Say grey.", "Say gray.", "the column 'prompt'"),
    ):
        (tmp_path / "records.jsonl").write_text(records.replace(old, new))
        assert main(["--config", str(path)]) == 2
        assert named in capsys.readouterr().err
    (tmp_path / "records.jsonl").write_text(records.replace("not used", "used by nobody"))
    execute(path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
