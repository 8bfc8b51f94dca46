"""Shared fixtures: tiny random models of several families and a real byte-level tokenizer, all made on the spot."""

import json
import os

import pytest
import torch

import distill  # noqa: F401 (before any test imports transformers, whose imports' warnings it ends)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests that run side by side share the cores instead of fighting for them.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

LONGEST = ("test_the_default_run_heals_a_real_model", "test_the_command_writes_every_table_and_repeats_nothing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first, so that of the workers none is left alone with one at the end."""
    items.sort(key=lambda item: item.name not in LONGEST)


# Of a tiny model, whatever its family; how many layers and which vocabulary a test says.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
TINY_SIZES = SIZES | GROUPED
TINY_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")


def tiny_model(
    family: str = "llama", *, vocab_size: int = 97, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
):
    """A random causal LM of `family` with 3 layers and hidden size 32, in eval mode, on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = SIZES | {
        "vocab_size": vocab_size,
        "num_hidden_layers": 3,
        "tie_word_embeddings": family != "gpt_neox",
    }
    own = {
        "llama": GROUPED,
        "qwen3": GROUPED,
        "gemma3_text": GROUPED | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "gpt_neox": {},
    }
    model_type = "gemma3_text" if family == "gemma3" else family
    options = common | own[model_type] | changes
    if "layer_types" in options:
        options["layer_types"] = options["layer_types"][: options["num_hidden_layers"]]
    config = AutoConfig.for_model(model_type, **options)
    # Larger than the usual 0.02, so that a tiny model's distribution is far from uniform.
    config.initializer_range = 0.3
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(params=["llama", "qwen3", "gpt_neox"])
def family(request) -> str:
    return request.param


CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{{ opening | default('') }}{% endif %}"
)


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE, pad: str | None = "<|pad|>"):
    """A byte-level tokenizer of 260 tokens: pad 0, begin 1, end 2, unknown 3, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|start|>", "<|end|>", "<|unknown|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    named = {"bos_token": special[1], "eos_token": special[2], "unk_token": special[3]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, **named)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """Folders of a tiny student (Llama, 3 layers) and teacher (Qwen3), with a head wider than their tokenizer."""
    folders = {}
    for name, family, seed in (("student", "llama", 1), ("teacher", "qwen3", 2)):
        folder = tmp_path_factory.mktemp(name)
        tiny_model(family, vocab_size=272 if name == "student" else 264, seed=seed).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        folders[name] = folder
    return folders


def ship_code(folder) -> None:
    """Turns a saved Llama into a model that only the Python code in its folder can load."""
    (folder / "tiny_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class TinyConfig(LlamaConfig):\n    model_type = 'tiny_remote'\n"
        "class TinyModel(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "tiny_remote",
        "auto_map": {"AutoConfig": "tiny_code.TinyConfig", "AutoModelForCausalLM": "tiny_code.TinyModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def poisoned(tmp_path):
    """Makes a teacher whose embedding of some characters is not a number: what reads them has no finite loss."""
    from transformers import AutoModelForCausalLM

    def make(characters: str):
        folder, tokenizer = tmp_path / "poisoned", tiny_tokenizer()
        model = tiny_model("qwen3", vocab_size=264, seed=2, tie_word_embeddings=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer(characters)["input_ids"]] = float("nan")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.isnan().any()
        return str(folder)

    return make


@pytest.fixture
def write_config(tmp_path, tiny_pair):
    """Writes a small run's configuration, with changes as {"section.key": value}; returns its path."""
    import yaml

    def write(changes: dict | None = None, name: str = "config.yaml"):
        (tmp_path / "prompts.txt").write_text("Say red.\nSay green.\nSay blue.\nSay grey.\nSay pink.\n")
        (tmp_path / "eval.txt").write_text("Count to three.\nName a bird.\n")
        content = {
            "student": {"model": str(tiny_pair["student"])},
            "teacher": {"model": str(tiny_pair["teacher"])},
            "prompts": {"train": str(tmp_path / "prompts.txt"), "eval": str(tmp_path / "eval.txt")},
            "rollout": {"max_new_tokens": 6, "prompts_per_batch": 2, "precision": "float32"},
            "training": {
                "num_rollouts_per_prompt": 2,
                "learning_rate": 1e-3,
                "output_dir": str(tmp_path / "run"),
                "device": "cpu",
            },
            "loss": {"objective": "reverse_kl"},
        }
        for key, value in (changes or {}).items():
            *sections, name_of_key = key.split(".")
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            place[name_of_key] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def server(served_folder):
    """A small server of the model in `served_folder`, which a test module gives."""
    from serving import ModelServer

    running = ModelServer(served_folder)
    yield running
    running.stop()


@pytest.fixture
def short_pauses(monkeypatch):
    """What failed is asked again at once."""
    monkeypatch.setattr("distill.servers.client.FIRST_PAUSE", 0.02)
