"""Hidden states that predict the completion tokens of a batch of rollouts, for student and teacher alike.

A prompt is computed once, however many completions it has, and no token of padding is computed: prompts and
completions are packed into one row, and an attention function of our own (`distill_kernels.prefix_attention`) keeps
them apart. Where layers keep a state instead, completions go on from that of their prompt (continued.py). Other models
get plain rows, a prompt each. Rows are described by lengths that the host knows, so that nothing here waits for an
accelerator, and no mask is compared with `pad_token_id`. Left out on purpose: logits and losses, which live behind the
head, and any change to the model that outlasts a call.
"""

import contextlib
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from distill.forward.continued import continued_hidden
from distill.forward.cpu_linear import OneDnnLinears
from distill.forward.packing import MAX_PADDING, Rows, host_rows, length_buckets, pack, pad
from distill.models import (
    attention_as,
    checkpointed,
    gradients_differ,
    keeps_states,
    sharing_refusal,
    unpacked_rows,
    windowed_layers,
)
from distill.runtime import to_device
from distill_kernels import PrefixLayout, prefix_attention

ATTENTION = "shared_prefix"
# Rows are computed plainly when that takes no more than this times the tokens of sharing. Measured on a CPU: the merge
# and the bookkeeping of sharing cost a small model as much as a seventh more tokens, a large one less.
WORTH_SHARING = 1.15
# Arguments with which a model may call its attention and still mean plain causal attention.
PLAIN_ARGUMENTS = frozenset(
    ("position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states")
)


@dataclass
class Sharing:
    """What the layers of a model are told in a pass that shares prompts."""

    layout: PrefixLayout
    longest_row: int  # tokens of the longest prompt and completion together
    handle: Tensor | None = None  # the layout's, for compiled layers


class NotShareableError(Exception):
    """This model's attention is more than what `prefix_attention` computes."""


def completion_hidden(
    body: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_lengths: Tensor | Sequence[int],
    prompt_index: Tensor | Sequence[int],
    *,
    checkpointing: bool = False,
    one_call: bool = False,
) -> Tensor:
    """Hidden states [K, H] from which each valid completion token is predicted, row 0's tokens first.

    `prompt_ids` [B, P] int64 is left-padded and `prompt_mask` [B, P] bool marks its tokens; `completion_ids` [R, T]
    int64 is right-padded and `completion_lengths` [R] counts its tokens; `prompt_index` [R] names each row's prompt.
    The first token's state is that of the last prompt token; gradients flow when grad mode is on. Mask, lengths and
    index are read on the host: keep them on the CPU (or as lists) and an accelerator is never waited for.
    `checkpointing` keeps only each layer's input and computes the layer again in the backward. `one_call` calls the
    body once, whatever the rows: ranks that share a model's weights out have to call it equally often.
    Raises ValueError when the arguments do not fit together. Warns, once a model type, when the model's attention is
    not plain causal, so that every row has to compute its own prompt.
    """
    rows = host_rows(prompt_ids, prompt_mask, completion_ids, completion_lengths, prompt_index)
    # A recomputation runs outside this context, and has to save what the first forward saved.
    with OneDnnLinears() if prompt_ids.device.type == "cpu" and not checkpointing else _nothing():
        return _hidden(body, prompt_ids, completion_ids, rows, checkpointing, one_call)


def _hidden(
    body: nn.Module, prompt_ids: Tensor, completion_ids: Tensor, rows: Rows, checkpointing: bool, one_call: bool
) -> Tensor:
    """`completion_hidden` by sharing prompts, or plainly where that is cheaper or the model does not allow it."""
    inputs = (body, prompt_ids, completion_ids, rows)
    buckets = length_buckets(rows, math.inf if one_call else MAX_PADDING)
    plainly = functools.partial(padded_hidden, *inputs, checkpointing=checkpointing, buckets=buckets)
    if sum(len(bucket) * rows.length(bucket[0]) for bucket in buckets) <= WORTH_SHARING * rows.packed_tokens():
        return plainly()
    stateful = keeps_states(body.config)
    shared = functools.partial(continued_hidden if stateful else shared_hidden, checkpointing=checkpointing)
    if stateful and body not in _REFUSED and not one_call:
        _REFUSED[body] = gradients_differ(
            body, *(functools.partial(_of_one_prompt, way) for way in (padded_hidden, shared))
        )
    reason = why_plain(body)
    if stateful and one_call and reason is None:
        reason = "ranks that share its weights out call it once, and states take two calls"
    if reason is None:
        try:
            return shared(*inputs)
        except NotShareableError as error:
            reason = _REFUSED[body] = str(error)
    _warn_once(body.config.model_type, reason)
    return plainly()


def shared_hidden(
    body: nn.Module, prompt_ids: Tensor, completion_ids: Tensor, rows: Rows, *, checkpointing: bool = False
) -> Tensor:
    """`completion_hidden` from one pass over each prompt and each completion, packed into one row [1, L].

    Raises NotShareableError.
    """
    device = prompt_ids.device
    packed = pack(rows, prompt_ids.shape[1], completion_ids.shape[1])
    source, positions, states = (to_device(each, device) for each in packed[:3])
    layout = PrefixLayout(packed.segments, packed.shared, functools.partial(to_device, device=device))
    sharing = Sharing(layout, rows.longest(), layout.handle())
    token_ids = torch.cat([prompt_ids.reshape(-1), completion_ids.reshape(-1)])
    ours = functools.partial(attention_as, body, ATTENTION)
    with ours(), checkpointed(body, ours) if checkpointing else _nothing():
        hidden = body(
            input_ids=token_ids[source][None],
            position_ids=positions[None],
            use_cache=False,
            shared_prefix=sharing,
        ).last_hidden_state
    config = body.config.get_text_config()
    if layout.calls != config.num_hidden_layers:
        raise NotShareableError(f"its {config.num_hidden_layers} layers called attention {layout.calls} times")
    windows = len(windowed_layers(config))
    told = layout.windowed_calls
    if told < windows and config.sliding_window < sharing.longest_row:
        raise NotShareableError(f"{windows} of its layers have a window, and {told} tell their attention so")
    return hidden[0][states]


def padded_hidden(
    body: nn.Module,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    rows: Rows,
    *,
    checkpointing: bool = False,
    buckets: list[list[int]] | None = None,
) -> Tensor:
    """`completion_hidden` the plain way: each row is its prompt and completion, computed by the model as it is.

    Rows are padded on the right, where no causal layer looks, so the model needs neither mask nor position ids.
    """
    batches, order = pad(rows, buckets or length_buckets(rows), prompt_ids.shape[1], completion_ids.shape[1])
    token_ids = torch.cat([prompt_ids.reshape(-1), completion_ids.reshape(-1)])
    found = []
    for batch in batches:
        source, states = (to_device(each, prompt_ids.device) for each in batch)
        with unpacked_rows(), checkpointed(body, _nothing) if checkpointing else _nothing():
            hidden = body(input_ids=token_ids[source], use_cache=False).last_hidden_state
        found.append(hidden.flatten(0, 1)[states])
    return torch.cat(found)[to_device(order, prompt_ids.device)]


def _of_one_prompt(hidden_of: Callable[..., Tensor], body: nn.Module, prompt_ids: Tensor, said: Tensor) -> Tensor:
    """Hidden states of a prompt's completions [R, T], all of it tokens, by `padded_hidden` or the like."""
    R, T = said.shape
    return hidden_of(body, prompt_ids, said, Rows([prompt_ids.shape[1]], [T] * R, [0] * R))


def why_plain(body: nn.Module) -> str | None:
    """Why each row computes its own prompt, as far as is known; None if it does not."""
    return _REFUSED.get(body) or sharing_refusal(body)


def refuse(body: nn.Module, reason: str) -> None:
    """Has a body share no prompts from now on."""
    _REFUSED[body] = reason


def refuse_like(body: nn.Module, other: nn.Module) -> None:
    """Has `other`, which computes what `body` does, share no prompts where `body` was found unable to."""
    if body in _REFUSED:
        _REFUSED[other] = _REFUSED[body]


def _shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    shared_prefix: Sharing | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """What a layer of the model calls in place of its attention: [1, h, L, d] to [1, L, h, dv].

    `s_aux` [h] are sinks, logits that take part in the softmax only.
    """
    if shared_prefix is None:
        raise NotShareableError("it does not hand arguments on to its attention")
    if attention_mask is not None or dropout or is_causal is False or not getattr(module, "is_causal", True):
        raise NotShareableError("its attention has dropout, a mask of its own, or looks ahead")
    window = sliding_window if sliding_window and sliding_window < shared_prefix.longest_row else None
    extra = [name for name, given in arguments.items() if given is not None and name not in PLAIN_ARGUMENTS]
    options = {"window": window, "softcap": softcap, "sinks": s_aux}
    if extra:
        raise NotShareableError(f"its attention takes {', '.join(extra)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    # Rotary embeddings may leave query and key in another precision than value, above all under autocast.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    layout = shared_prefix.handle if torch.compiler.is_compiling() else shared_prefix.layout
    packed = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    with torch.autocast(kind, enabled=False):
        return prefix_attention(*packed, layout, scale, **options)[None], None


AttentionInterface.register(ATTENTION, _shared_prefix_attention)

_REFUSED: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
_nothing = contextlib.nullcontext


@functools.cache
def _warn_once(model_type: str, reason: str) -> None:
    warnings.warn(
        f"model type {model_type!r} computes its prompt once per row, as {reason}: slower, with the same result",
        stacklevel=3,
    )
