"""Shared fixtures: tiny random models of several families and a real byte-level tokenizer, all made on the spot."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")


def tiny_model(family: str = "llama", *, vocab_size: int = 97, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random causal LM of `family` with 3 layers and hidden size 32, in eval mode, on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": family != "gpt_neox",
    }
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    own = {
        "llama": grouped,
        "qwen3": grouped,
        "gemma3_text": grouped | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
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
