"""`python -m benchmarks.make_models FOLDER`: random models of Qwen3 sizes and a tokenizer, for runs without a network.

FOLDER/student is a Qwen3-0.6B and FOLDER/teacher a Qwen3-4B in bfloat16 (9.2 GB together), made on the GPU where there
is one. Both have one tokenizer, of words, in which no token ends a completion: every rollout is as long as it may be.
With DRY=1 both are a few kilobytes.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.harness import DRY, gpu_or_cpu

TEXT = "The harbour was quiet in the morning, and the boats came back one after another with what they had caught. "

# Qwen3-0.6B and Qwen3-4B; their tokenizer has 151,643 tokens beside the special ones, the heads are padded.
if DRY:
    QWEN3 = {"vocab_size": 288, "head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": True}
    SMALL = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LARGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    NUM_TOKENS = 256
else:
    QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True}
    SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    LARGE = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    NUM_TOKENS = 151_643


def random_model(
    sizes: Mapping[str, int], dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> PreTrainedModel:
    """A random Qwen3 in eval mode, made where it will be; the same one in every run on the same device."""
    torch.manual_seed(0)
    with device or gpu_or_cpu():
        config = AutoConfig.for_model("qwen3", **QWEN3, **sizes)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def word_tokenizer(size: int = NUM_TOKENS) -> PreTrainedTokenizerFast:
    """A word or punctuation mark is a token: padding, the unknown one, those of TEXT, then `w0`, `w1` and so on."""
    cut = pre_tokenizers.Whitespace()
    words = list(dict.fromkeys(["<pad>", "<unk>", *(word for word, _ in cut.pre_tokenize_str(TEXT))]))
    words += [f"w{i}" for i in range(size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = cut
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def prompt_of(tokenizer, length: int) -> str:
    """A text that the tokenizer cuts into exactly `length` tokens."""
    text = tokenizer.decode(tokenizer(TEXT * (length // 16 + 1))["input_ids"][:length])
    assert len(tokenizer(text)["input_ids"]) == length
    return text


def make_models(folder: Path) -> tuple[Path, Path]:
    """Writes both models; returns the student's folder and the teacher's."""
    tokenizer = word_tokenizer()
    for name, sizes in (("student", SMALL), ("teacher", LARGE)):
        random_model(sizes, torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_models", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    make_models(parser.parse_args().folder)
