"""Prompts through the `datasets` library and from CSV: formats, columns, conversations, limits, and what is refused."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import tiny_tokenizer
from test_train import ROOT, environment, execute, main, metrics_of

from distill.config import load_config
from distill.prompts import PromptError, load_prompts

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is red?"},
    {"role": "assistant", "content": "A colour."},
    {"role": "user", "content": "And blue?"},
]
ANSWER = {"role": "assistant", "content": "Another."}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows: list[dict]):
    """Rows as a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, **options):
    return load_prompts(path, tiny_tokenizer(), **options)


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.jsonl", "folder/train.parquet", "folder/train.jsonl"])
def test_every_format_gives_the_same_prompts(tmp_path, name):
    rows = [{"prompt": text, "teacher": None} for text in ("One", "Two\nlines", 'a "quoted", cell', "007", "NA")]
    rows[1]["teacher"] = "code"
    path = write(tmp_path / ("set" if "folder" in name else "[x]") / name, rows)
    prompts = load(path.parent if "folder" in name else path)
    assert prompts.texts == ["One", "Two\nlines", 'a "quoted", cell', "007", "NA"]
    assert prompts.teachers == [None, "code", None, None, None]
    assert prompts.messages[0] == [{"role": "user", "content": "One"}]
    assert prompts.digest == load(write(tmp_path / "same.jsonl", rows)).digest


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl"])
def test_the_student_answers_the_last_turn_of_a_conversation(tmp_path, name):
    rows = [{"messages": TALK}, {"messages": [*TALK, ANSWER]}, {"messages": [ANSWER]}]
    prompts = load(write(tmp_path / name, rows))
    assert prompts.messages == [TALK, TALK]
    assert (prompts.answered, prompts.empty) == (2, 1)
    text = tiny_tokenizer().decode(prompts.token_ids[1])
    assert text.endswith("<|start|>user\nAnd blue?<|end|>\n<|start|>assistant\n")
    assert "A colour." in text
    assert "Another." not in text


def test_parts_of_a_message_that_are_null_are_as_if_they_were_not_there(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a", "name": None}]}]
    rows.append({"messages": [{"role": "user", "content": "b", "name": "Ann"}]})
    for name in ("p.parquet", "p.jsonl"):
        first, second = load(write(tmp_path / name, rows)).messages
        assert first == [{"role": "user", "content": "a"}]
        assert second == [{"role": "user", "content": "b", "name": "Ann"}]


def test_a_column_is_named_or_found(tmp_path):
    row = {"id": 7, "question": "Why?", "prompt": "How?", "messages": TALK, "talk": [*TALK, ANSWER]}
    path = write(tmp_path / "p.parquet", [row])
    assert load(path).texts == ["How?"]
    assert load(path, column="question").texts == ["Why?"]
    assert load(path, column="talk").messages == [TALK]
    prompt_of_messages = write(tmp_path / "q.parquet", [{"prompt": TALK}])
    assert load(prompt_of_messages).messages == [TALK]
    (tmp_path / "p.txt").write_text("Plain\n")
    assert load(tmp_path / "p.txt", column="question").texts == ["Plain"]  # text has no columns


def test_splits_of_a_folder_are_named_after_it(tmp_path):
    write(tmp_path / "set" / "data" / "train-00000.parquet", [{"prompt": "learn"}])
    write(tmp_path / "set" / "data" / "test-00000.parquet", [{"prompt": "check"}])
    assert load(tmp_path / "set").texts == ["learn"]
    assert load(tmp_path / "set:test").texts == ["check"]
    with pytest.raises(PromptError, match=r"set: cannot be read: ValueError: Bad split: other\. Available splits: "):
        load(tmp_path / "set:other")


def test_a_folder_may_name_its_files_in_its_readme(tmp_path):
    write(tmp_path / "set" / "a.parquet", [{"prompt": "from a"}])
    write(tmp_path / "set" / "b.parquet", [{"prompt": "from b"}])
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: held_out\n    path: b.parquet\n---\n"
    (tmp_path / "set" / "README.md").write_text(readme)
    assert load(tmp_path / "set:held_out").texts == ["from b"]


def test_a_limit_takes_the_first_records_and_reads_no_further(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(9)])
    path.write_text(path.read_text() + "broken\n")
    assert load(path, limit=4).texts == ["0", "1", "2", "3"]
    with pytest.raises(PromptError, match="line 10: not valid JSON"):
        load(path)
    many = write(tmp_path / "p.parquet", [{"prompt": str(i)} for i in range(5000)])
    assert load(many, limit=3000).texts[-1] == "2999"
    assert len(load(many)) == 5000


def test_a_limit_lets_a_large_file_be_read_in_part(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.write(b"One\nTwo\n")
        file.truncate(3 * 2**30)  # takes no room on the disk
    assert load(path, limit=2).texts == ["One", "Two"]


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"prompt": 1}, {"prompt": 2}], {}, r"row 1: expected in a column .* found prompt: 1$"),
        (
            [{"prompt": "a"}, {"prompt": None}],
            {},
            r"row 2: expected in a column .* found the columns|found prompt: None",
        ),
        ([{"prompt": b"bytes"}], {}, r"row 1: .* found prompt: b'bytes'"),
        ([{"text": "a"}], {}, r"row 1: expected in a column `prompt` or `messages`"),
        ([{"prompt": "a"}], {"column": "text"}, r"row 1: expected in the column 'text'"),
        ([{"messages": "text"}], {}, r"row 1: .* found messages: 'text'"),
        ([{"messages": [{"role": "king", "content": "a"}]}], {}, "with a role of system, user"),
        ([{"messages": [{"role": "user", "content": None}]}], {}, "row 1: expected"),
        (
            [{"prompt": "a", "teacher": 3}],
            {},
            "row 1: expected a teacher's name as text, or names",
        ),
        ([{"prompt": " "}], {}, r"no usable prompt \(1 empty"),
    ],
)
def test_cells_that_are_no_prompt_are_named_by_row_and_column(tmp_path, rows, options, expected):
    path = write(tmp_path / "p.parquet", rows)
    with pytest.raises(PromptError, match=expected) as caught:
        load(path, **options)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"prompt,b\nx\n", "line 2: expected 2 cells, as in the first line; found 1"),
        (b'prompt\n"open\n', "not valid CSV"),
        (b"prompt\ncaf\xe9\n", r"not UTF-8 text \(byte 10\)"),
        (b"prompt\na\0b\n", "byte 8 is NUL"),
        (b"prompt\n" + b"x" * 2**23, "line 2: not valid CSV: field larger"),
        (b"", "no usable prompt"),
        (b"other\nx\n", "line 2: expected in a column `prompt`"),
    ],
)
def test_csv_that_is_refused(tmp_path, content, expected):
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=expected):
        load(path)


def test_a_cell_longer_than_any_prompt_is_left_out(tmp_path):
    prompts = load(write(tmp_path / "p.parquet", [{"prompt": "x" * (2**22 + 1)}, {"prompt": "y"}]))
    assert (prompts.texts, prompts.too_long) == (["y"], 1)


def test_damaged_parquet_is_refused(tmp_path):
    path = write(tmp_path / "p.parquet", [{"prompt": "a"}])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(PromptError, match=r"p\.parquet: cannot be read: "):
        load(path)


def test_no_code_of_a_dataset_is_run_and_nothing_is_unpickled(tmp_path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(PromptError, match="scripts are no longer supported"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.tar").write_bytes(b"\0" * 1024)
    with pytest.raises(PromptError, match="holds files of the kind webdataset; those read are arrow, csv, json"):
        load(pictures)


@pytest.mark.parametrize("elsewhere", ["../outside.jsonl", "{tmp}/outside.jsonl"])
def test_a_readme_cannot_name_files_outside_the_folder(tmp_path, elsewhere):
    write(tmp_path / "outside.jsonl", [{"prompt": "secret"}])
    write(tmp_path / "set" / "a.jsonl", [{"prompt": "own"}])
    path = elsewhere.format(tmp=tmp_path)
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n")
    with pytest.raises(PromptError) as caught:
        load(tmp_path / "set")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["hub:no-owner", "hub:a/b/c/d", "hub:a/b:x:y", "hub:../b/../c", "hub:"])
def test_a_hub_name_is_checked_before_anything_is_asked(tmp_path, name):
    with pytest.raises(PromptError, match=r"expected hub:OWNER/NAME"):
        load(Path(name))


def test_a_hub_dataset_that_was_downloaded_before_is_read_without_the_hub(tmp_path):
    rows = [{"prompt": "One", "teacher": "code", "other": 1}, {"prompt": "Two", "teacher": None, "other": 2}]
    write(tmp_path / "set" / "test.parquet", rows)
    builder = datasets.load_dataset_builder(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    (tmp_path / "cache" / "set").rename(tmp_path / "cache" / "owner___set")  # where it is of the hub
    (config,) = (tmp_path / "cache" / "owner___set").iterdir()
    config.rename(config.with_name("default"))
    prompts = load(Path("hub:owner/set:test"))
    assert (prompts.texts, prompts.teachers) == (["One", "Two"], ["code", None])
    assert load(Path("hub:owner/set:test"), limit=1).texts == ["One"]
    with pytest.raises(PromptError, match="hub:owner/set:train: cannot be read"):
        load(Path("hub:owner/set:train"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_that_cannot_be_reached_is_named(write_config, capsys, streaming):
    path = write_config({"prompts.train": "hub:owner/absent:test", "prompts.streaming": streaming})
    assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "hub:owner/absent:test: cannot be read: " in message
    assert "Traceback" not in message


def test_text_is_read_without_the_library_and_the_rest_says_how_to_get_it(tmp_path):
    write(tmp_path / "p.parquet", [{"prompt": "a"}])
    for name in ("p.jsonl", "p.csv"):
        write(tmp_path / name, [{"prompt": "a"}])
    code = f"""
import sys
sys.modules["datasets"] = None  # as if it were not installed
sys.path.insert(0, "tests")
from pathlib import Path
from conftest import tiny_tokenizer
from distill.prompts import PromptError, load_prompts
for name in ("p.jsonl", "p.csv"):
    assert load_prompts(Path({str(tmp_path)!r}) / name, tiny_tokenizer()).texts == ["a"]
try:
    load_prompts(Path({str(tmp_path)!r}) / "p.parquet", tiny_tokenizer())
except PromptError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert "pip install 'distill-on-policy[data]'" in result.stdout


def test_a_run_on_a_dataset_is_the_run_on_the_same_text_and_resumes(write_config, tmp_path):
    texts = [f"Say {word}." for word in ("red", "green", "blue", "grey", "pink")]
    write(tmp_path / "set" / "train.parquet", [{"prompt": text} for text in texts])
    execute(write_config({"training.output_dir": str(tmp_path / "text")}))
    options = {"prompts.train": str(tmp_path / "set"), "training.output_dir": str(tmp_path / "set-run")}
    execute(write_config({**options, "training.max_steps": 2}))
    execute(write_config(options))  # continues
    assert metrics_of(tmp_path / "set-run") == metrics_of(tmp_path / "text")


def test_a_dataset_that_has_changed_is_not_continued(write_config, tmp_path, capsys):
    path = write(tmp_path / "p.parquet", [{"prompt": text} for text in ("a", "b", "c")])
    options = {"prompts.train": str(path), "training.max_steps": 1, "prompts.eval": None}
    execute(write_config(options))
    write(path, [{"prompt": text} for text in ("a", "B", "c")])
    assert main(["--config", str(write_config({**options, "training.max_steps": 2}))]) == 2
    assert f"prompts.train: the column 'prompt' of {path} holds something else than before" in capsys.readouterr().err


def documented(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    return block


def test_the_documented_records_are_prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text(documented("json"))
    prompts = load(tmp_path / "p.jsonl")
    texts = ["Why is the sky blue?"] * 2 + ["Sort a list in Rust.", "Explain a proof by induction.", "3"]
    assert prompts.texts == texts
    assert prompts.teachers == [None, None, "code", {"math": 0.7, "main": 0.3}, None]
    assert [tools and tools[0]["function"]["name"] for tools in prompts.tools] == [None] * 4 + ["add"]


def test_the_documented_configuration_is_one(write_config):
    path = write_config({"prompts.eval": None})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | yaml.safe_load(documented("yaml"))))
    config = load_config(path).prompts
    assert str(config.train) == "hub:HuggingFaceH4/ultrachat_200k:train_sft"
    assert (config.limit, config.eval_limit, config.streaming) == (20000, 64, True)
