"""What the configuration of an architecture says of its attention: which of our own ways to compute it are open.

The answers hold as far as a configuration tells; what it does not say, the first call finds out.
"""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from distill.models.states import STATE_LAYERS, keeps_states

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
BESIDE_STATES = STATE_LAYERS | {"moe", "mlp"}  # what a model with states may have too; the latter two keep nothing


def native_refusal(model: PreTrainedModel) -> str | None:
    """Why the native engine cannot decode this model, or None."""
    config = model.config.get_text_config()
    stateful = keeps_states(config)
    kinds = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS - (BESIDE_STATES if stateful else set())
    if config.is_encoder_decoder:
        return "an encoder-decoder has no prompt cache of the causal kind"
    if kinds:
        return f"layers of the kinds {sorted(kinds)} keep no keys and values of every position"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers share one another's keys and values"
    if not (model._supports_attention_backend or stateful):  # hybrid families leave it unsaid: the first call tells
        return f"{type(model).__name__} computes attention itself and takes no other function for it"
    return None


def sharing_refusal(body: nn.Module) -> str | None:
    """Why a prompt cannot be computed once for all of its rows, or None."""
    config = body.config.get_text_config()
    if keeps_states(config):  # nothing here is replaced; whether gradients enter a prompt's state is tried out
        return None
    if not getattr(body, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - KNOWN_LAYERS or getattr(config, "attention_chunk_size", None):
        return f"its layers are {', '.join(sorted(kinds)) or 'chunked'}"
    return None


def windowed_layers(config: Any) -> set[int]:
    """The layers of which the configuration says that they see no further than a sliding window.

    A model may say so to its attention function, or only in the mask, which none of our own functions reads.
    """
    if not getattr(config, "sliding_window", None) or not getattr(config, "use_sliding_window", True):
        return set()
    # Any configuration takes any key and keeps it: one that its class does not name, no layer reads.
    named = "sliding_window" in inspect.signature(type(config)).parameters
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * named * config.num_hidden_layers
    return {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}


def fits_capture(body: nn.Module) -> bool:
    """Whether a decode step may be tried as one that is captured and repeated: not where states, which a step replaces,
    are kept. On CUDA neither latents nor experts, of which no step has been captured there yet.
    """
    config = body.config.get_text_config()
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    unknown = body.device.type == "cuda" and (experts or getattr(config, "kv_lora_rank", None))
    return not (keeps_states(config) or unknown)
