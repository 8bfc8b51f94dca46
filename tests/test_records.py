"""Records stay whole beside their prompts, and a run notices when one of their columns that it uses has changed."""

import json

import datasets
import pytest
from conftest import tiny_tokenizer
from test_data import own_cache, write  # noqa: F401 (the first is a fixture for all tests here)
from test_train import execute, main

from distill.prompts import PromptError, load_prompts
from distill.run import checkpoint
from distill.run.identity import Identity
from distill.runtime import read_json_lines

ROWS = [
    {"prompt": "One", "teacher_prompt": "The first", "weight": 1.5, "tags": ["a", "b"], "made": {"by": "hand"}},
    {"prompt": " ", "teacher_prompt": "left out", "weight": 2.5, "tags": [], "made": {"by": None}},
    {"prompt": "Two", "teacher_prompt": None, "weight": None, "tags": ["c"], "made": {"by": "ear"}},
]


def load(path, **options):
    return load_prompts(path, tiny_tokenizer(), **options)


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "folder/train.parquet", "folder/train.jsonl"])
def test_a_record_keeps_all_its_columns(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    prompts = load(path.parent if "folder" in name else path)
    assert prompts.records == [ROWS[0], ROWS[2]]
    assert prompts.columns == ("prompt",)


def test_records_of_text_and_of_csv(tmp_path):
    (tmp_path / "p.txt").write_text("One\n\nTwo\n")
    assert load(tmp_path / "p.txt").records == [{"prompt": "One"}, {"prompt": "Two"}]
    (tmp_path / "p.csv").write_text("answer,prompt\n007,One\n")
    assert load(tmp_path / "p.csv").records == [{"answer": "007", "prompt": "One"}]


def test_pictures_are_left_out_undecoded_whatever_their_depth(tmp_path):
    """Their bytes are no picture here, so that decoding them would fail."""
    broken = {"bytes": b"no picture", "path": None}
    columns = {"prompt": ["One"], "picture": [broken], "many": [[broken]], "inside": [{"a": broken}], "answer": [7]}
    kinds = datasets.Features(
        prompt=datasets.Value("string"),
        picture=datasets.Image(),
        many=datasets.List(datasets.Image()),
        inside={"a": datasets.Image()},
        answer=datasets.Value("int64"),
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(tmp_path / "set" / "train.parquet")
    assert load(tmp_path / "set").records == [{"prompt": "One", "answer": 7}]


def test_columns_of_mixed_kinds_are_kept(tmp_path):
    """The library has a kind of its own for them, which it decodes too: from JSON."""
    rows = [
        {"prompt": "One", "answer": {"a": 1}},
        {"prompt": "Two", "answer": "text"},
        {"prompt": "Three", "answer": 3},
    ]
    assert load(write(tmp_path / "set" / "train.jsonl", rows).parent).records == rows


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_record_names_one_teacher_or_several_with_their_shares(tmp_path, name):
    """A table fills the names that only other rows have with null."""
    shares = [{"math": 0.7, "chat": 0.3}, {"math": 1}, None, {"math": None}]
    prompts = load(write(tmp_path / name, [{"prompt": "a", "teacher": teacher} for teacher in shares]))
    assert prompts.teachers == [{"math": 0.7, "chat": 0.3}, {"math": 1}, None, None]
    assert prompts.digest != load(write(tmp_path / f"other-{name}", [{"prompt": "a"}] * 4)).digest


@pytest.mark.parametrize(
    "shares",
    [{"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0}, {"a": "1"}, {"a": True}, {"a": float("nan"), "b": 1.0}],
)
def test_shares_that_are_none_are_refused_with_their_place(tmp_path, shares):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "a", "teacher": shares}])
    with pytest.raises(PromptError, match=r"p\.jsonl, line 2: .* shares above 0 that add up to 1"):
        load(path)


def test_a_digest_for_each_column(tmp_path):
    def digests(name, rows):
        return load(write(tmp_path / name, rows)).column_digests(["prompt", "weight", "made"])

    first = digests("a.jsonl", ROWS)
    assert set(first) == {"prompt", "weight", "made"}
    assert digests("b.parquet", ROWS) == first
    changed = [dict(row, weight=9) for row in ROWS]
    assert {name for name, digest in digests("c.jsonl", changed).items() if digest != first[name]} == {"weight"}
    # What is left out does not count, nor does how a prompt is written where its token ids are the same.
    same = [ROWS[0] | {"prompt": "One"}, ROWS[1] | {"weight": 9}, ROWS[2]]
    assert digests("d.jsonl", same) == first


SAVED = Identity("p", {"prompt": "1", "hint": "2"}, ("hint",), ("prompt",), "t").state()


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({}, []),
        ({"columns": {"prompt": "1", "hint": "3"}}, ["the column 'hint' of f.jsonl holds something else than before"]),
        (
            {"prompts": "q", "columns": {"prompt": "5", "hint": "3"}},
            [
                "the column 'hint' of f.jsonl holds something else than before",
                "the column 'prompt' of f.jsonl holds something else than before, or gives other token ids (tokenizer, "
                "chat template)",
            ],
        ),
        ({"columns": {"prompt": "1"}}, ["the column 'hint' of f.jsonl was used, and is not any more"]),
        (
            {"columns": {"prompt": "1", "hint": "2", "x": "4"}},
            ["the column 'x' of f.jsonl is used, and was not before"],
        ),
        ({"prompts": "q"}, ["the prompts in f.jsonl are others than before"]),
        (
            {"teacher_prompts": "u"},
            [
                "the prompts in f.jsonl are the same, and what the teachers see of them is something else than before: "
                "has a tokenizer or a chat template of theirs changed?"
            ],
        ),
    ],
)
def test_what_has_changed_since_a_checkpoint_is_named(now, said):
    current = Identity(**(SAVED | now), further=("hint",), own=("prompt",))
    assert current.differences(json.loads(json.dumps(SAVED)), "f.jsonl") == [f"prompts.train: {line}" for line in said]


def test_a_checkpoint_of_an_older_version_is_compared_by_what_it_has():
    older = {"prompts": "p"}
    plain = Identity("p", {"prompt": "1", "teacher": "2"}, (), ("prompt",), "t")
    assert plain.differences(older, "f") == []
    assert plain._replace(prompts="q").differences(older, "f") == [
        "prompts.train: the prompts in f are others than before"
    ]
    (line,) = Identity(**SAVED, further=("hint",), own=("prompt",)).differences(older, "f")
    assert "the column 'hint' of f is used, and the checkpoint, of an older version, does not say" in line


def test_the_label_of_an_evaluation_is_the_old_one_until_further_columns_are_used():
    plain = Identity("p", {"prompt": "1", "teacher": "2"}, (), ("prompt",), "")
    assert plain.label == "p"
    one, other = (Identity("p", {"prompt": "1", "hint": hint}, ("hint",), ("prompt",), "").label for hint in "23")
    assert len({one, other, "p"}) == 3


@pytest.fixture
def hinted(write_config, tmp_path):
    """A run whose teachers' prompts are made from a column: its configuration's path, and what writes that column."""

    def rewrite(hint, where="train"):
        rows = [{"prompt": f"Say {i}.", "hint": hint, "unused": hint, "teacher": "b"} for i in range(3)]
        return write(tmp_path / f"{where}.jsonl", rows)

    changes = {"prompts.train": str(rewrite("x")), "prompts.eval": str(rewrite("x", "eval")), "training.max_steps": 1}
    path = write_config({**changes, "teacher.others": {"b": "base"}, "teacher.column": "hint"})
    execute(path)
    return path, rewrite


def test_a_used_column_that_has_changed_is_not_continued(hinted, tmp_path, capsys):
    path, rewrite = hinted
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert set(checkpoint.load(saved).state["columns"]) == {"prompt", "teacher", "hint"}
    file = rewrite("y")
    assert main(["--config", str(path), "--training.max_steps", "2"]) == 2
    message = capsys.readouterr().err
    assert f"prompts.train: the column 'hint' of {file} holds something else than before\n" in message
    assert "unused" not in message
    assert "'prompt'" not in message


def test_held_out_records_that_have_changed_are_another_evaluation(hinted, tmp_path):
    path, rewrite = hinted
    rewrite("y", "eval")
    assert main(["--config", str(path), "--training.max_steps", "2"]) == 0
    labels = [line["clusters"]["prompts"] for line in read_json_lines(tmp_path / "run" / "evaluations.jsonl")]
    assert labels[0] == labels[1] != labels[2]


def test_a_checkpoint_of_an_older_version_goes_on(write_config, tmp_path):
    """From before checkpoints knew columns, and their configurations some keys."""
    path = write_config({"training.max_steps": 1})
    run = execute(path)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    found = checkpoint.load(saved)
    assert found.state["prompts"] == run.parts.prompts.student.digest
    for name in ("columns", "teacher_prompts"):
        del found.state[name]
    for section, key in (("rollout", "stop_ids"), ("student", "chat_template_kwargs"), ("prompts", "system_prompt")):
        del found.state["config"][section][key]
    checkpoint.accept(found, run.parts.config, run.parts.prompts.identity, run.parts.student, {})
