"""Layers that keep a state instead of the keys of every position: state-space models, delta rules, short convolutions.

Found by the cache layers that transformers gives an architecture, never by its name. Of such a layer the next token
sees a state of fixed size, which is copied for each row that continues a prompt; of attention, beside it or alone, the
keys of all positions. `GraphState` is the layer through which a prompt's state carries gradients.
Left out on purpose: models that keep states in caches or modules of their own, which stay with what transformers does.
"""

import copy
import functools
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.utils import import_utils

# What transformers computes such layers with where it is installed, by itself and on a GPU.
KERNELS = {
    "flash-linear-attention": import_utils.is_flash_linear_attention_available,
    "causal-conv1d": import_utils.is_causal_conv1d_available,
}
STATE_LAYERS = {
    kind for kind, layer in DYNAMIC_LAYER_TYPE_MAPPING.items() if issubclass(layer, LinearAttentionCacheLayerMixin)
}


def keeps_states(config: Any) -> bool:
    """Whether a model of this configuration has layers that keep a state."""
    return bool(STATE_LAYERS & set(getattr(config.get_text_config(), "layer_types", None) or ()))


def warn_of_absent_kernels(config: Any) -> None:
    """Says, once a model type, which packages for its states are not installed and what that costs; for a GPU."""
    absent = [name for name, is_available in KERNELS.items() if not is_available()]
    if absent and keeps_states(config):
        _warn_once(config.model_type, " and ".join(absent))


@functools.cache
def _warn_once(model_type: str, absent: str) -> None:
    warnings.warn(
        f"model type {model_type!r} has layers that keep a state, and without {absent} they run as many small PyTorch "
        f"operations: the same result, much slower; pip install 'distill-on-policy[hybrid]'",
        stacklevel=3,
    )


class Stateless:
    """Stands for a layer that keeps no state, so that each has its number."""

    keys = values = None


class GraphState(LinearAttentionLayer):
    """A state that is replaced where the stock layer writes in place, which would cut or break the graph."""

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states)
        self.record_past = True  # models convolve even a single token through `update_conv_state` then

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """[n, channels, tokens] after what was kept, of which the last `conv_kernel_size` are kept."""
        if self.has_previous_state[state_idx]:
            size = self.conv_kernel_size[state_idx]
            conv_states = torch.cat([self.conv_states[state_idx], conv_states], -1)
        else:
            size = self.conv_kernel_size[state_idx] = conv_kernel_size or conv_states.shape[-1]
            conv_states = nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
            self.has_previous_state[state_idx] = True
        self.conv_states[state_idx] = conv_states[..., -size:]
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class GraphStateAndKeys(GraphState, LinearAttentionAndFullAttentionLayer):
    """The same for a layer that has attention too."""


def empty_cache(config: Any, *, graph: bool = False) -> Cache:
    """A cache for a model of this configuration in which attention keeps all positions, whatever its window.

    `graph` has states carry gradients; keys and values do so by themselves.
    """

    def fitting(layer: Any) -> Any:
        count = getattr(layer, "number_of_states", None)
        if isinstance(layer, LinearAttentionLayer) and isinstance(layer, DynamicLayer):
            return (GraphStateAndKeys if graph else LinearAttentionAndFullAttentionLayer)(number_of_states=count)
        if isinstance(layer, LinearAttentionLayer):
            return GraphState(count) if graph else layer
        return DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer

    return Cache(layers=[fitting(layer) for layer in DynamicCache(config=config).layers])


def cache_argument(body: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache under the name by which this model's forward takes it."""
    return {_cache_name(type(body)): cache}


@functools.cache
def _cache_name(kind: type[nn.Module]) -> str:
    return "cache_params" if "cache_params" in inspect.signature(kind.forward).parameters else "past_key_values"


def take_keys(layers: list, nothing: Tensor) -> tuple[list[Tensor], list[Tensor], list]:
    """Keys and values out of filled cache layers, `nothing` for a layer without; what remains are the states."""
    keys, values = ([getattr(layer, name, None) for layer in layers] for name in ("keys", "values"))
    states = [layer if isinstance(layer, LinearAttentionCacheLayerMixin) else Stateless() for layer in layers]
    for layer in states:
        layer.keys = layer.values = None
    return *([nothing if each is None else each for each in pieces] for pieces in (keys, values)), states


def snapshot(layers: list) -> list:
    """Cache layers that hold the same tensors, and go on holding them when the given ones are filled further."""
    copies = [copy.copy(layer) for layer in layers]
    for layer in copies:
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    return copies


def of_rows(layers: list, index: Tensor) -> list:
    """Cache layers for other rows: row r gets a copy of what row `index[r]` has; the given layers stay as they are."""

    def take(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: take(each) for key, each in value.items()}
        return value.index_select(0, index) if isinstance(value, Tensor) else value

    copies = [copy.copy(layer) for layer in layers]
    for layer in copies:
        vars(layer).update({name: take(value) for name, value in vars(layer).items()})
    return copies


def joined(parts: list[list], order: Tensor) -> list:
    """Cache layers of several batches as one batch, whose row r is row `order[r]` of all of them in turn."""

    def join(values: list) -> Any:
        if isinstance(values[0], dict):
            return {key: join([each[key] for each in values]) for key in values[0]}
        return torch.cat(values)[order] if isinstance(values[0], Tensor) else values[0]

    copies = [copy.copy(layer) for layer in parts[0]]
    for number, layer in enumerate(copies):
        each = [vars(part[number]) for part in parts]
        vars(layer).update({name: join([values[name] for values in each]) for name in each[0]})
    return copies


def tensors_of(layers: list) -> list[Tensor]:
    """All tensors that cache layers hold."""
    values = [value for layer in layers for value in vars(layer).values()]
    flat = [each for value in values for each in (value.values() if isinstance(value, dict) else (value,))]
    return [each for each in flat if isinstance(each, Tensor)]
