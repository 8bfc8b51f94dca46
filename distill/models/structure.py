"""The pieces of a loaded model: body and head, its stack of layers, copies that share its tensors.

A model is used in two pieces, the body (token ids to hidden states) and the head (hidden states to logits), so that
logits exist only inside the fused operations. Left out on purpose: patches per model family.
"""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.head_inputs import HeadInputs
from distill.models.sources import ModelError

# What configurations call the soft cap of the logits.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Head(NamedTuple):
    """The output layer: `logits = softcap · tanh(scale · (h Wᵀ + b) / softcap)`."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., H] to float32 logits [.., V]."""
        return self.finished(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float())

    def finished(self, products: Tensor) -> Tensor:
        """`h Wᵀ + b` in float32 to logits."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def split_head(model: PreTrainedModel, vocab_size: int | None = None) -> tuple[nn.Module, Head]:
    """The body, whose `last_hidden_state` follows the final norm, and the head; weights are shared, not copied.

    `vocab_size` leaves out the padded columns past the tokenizer.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"model type {model.config.model_type!r} has no output embeddings, so it is no causal LM")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    bias = getattr(output, "bias", None)
    head = Head(
        *(_first(tensor, vocab_size) for tensor in (output.weight, bias)),
        next(filter(None, (getattr(config, name, None) for name in SOFTCAPS)), None),
        scale,
    )
    return body_of(model), head


def _first(tensor: Tensor | None, rows: int | None) -> Tensor | None:
    """Itself where that is all of it: the gradient of a slice is a whole tensor of zeros, filled and copied to."""
    return tensor if tensor is None or rows in (None, len(tensor)) else tensor[:rows]


def body_of(model: PreTrainedModel) -> nn.Module:
    """What gives hidden states of text; where a class names no base of its own, the one model in it."""
    if getattr(model, "split_at_head", False):  # as `find_split` found
        return HeadInputs(model)
    inside = text_model(model)
    inner = [child for child in inside.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if inside.base_model is inside and len(inner) == 1 else inside.base_model


def has_other_parts(model: PreTrainedModel) -> bool:
    """Whether a model has parts beside the one that text passes, such as a vision tower."""
    return model.config.get_text_config() is not model.config


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that text passes: the decoder inside one of several parts, all of any other."""
    return model.get_decoder() if has_other_parts(model) else model


def alias(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules and a configuration of its own, and the very tensors of `model`."""
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo=tensors)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; where its rows are shared out over ranks, they are gathered, for which all must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def without_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """`model` without some of its decoder layers, sharing the weights of the others; `model` stays whole."""
    pruned = alias(model)
    remove_layers(pruned, layers)
    return pruned


def layer_stack(model: PreTrainedModel, key: str) -> tuple[nn.Module, str]:
    """The module that holds the decoder layers, and their list's name there. `key` wants it; raises `ModelError`."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = [
        (parent, name)
        for parent in text_model(model).modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise ModelError(f"{key}: model type {model.config.model_type!r} has no single stack of layers")
    return stacks[0]


def remove_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Removes decoder layers in place and renumbers the rest, so that caches and configuration stay right."""
    dropped = sorted(set(layers))
    if not dropped:
        return
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    if dropped[0] < 0 or dropped[-1] >= count or len(dropped) >= count:
        raise ModelError(f"student.drop_layers: {dropped} does not fit a model of {count} layers (0 to {count - 1})")
    parent, name = layer_stack(model, "student.drop_layers")
    kept = [i for i in range(count) if i not in dropped]
    layers = nn.ModuleList(getattr(parent, name)[i] for i in kept)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(parent, name, layers)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
