"""`prefix_attention`: exact attention over packed tokens in which completions share their prompt's keys, un-repeated.

A packed sequence is a run of causal segments without padding: prompts first, then completions, a prompt's next to
each other. A completion token attends causally to its own segment and to its prompt, both through a window if there is
one. On CUDA in half precision that runs in triton_prefix_attention.py, elsewhere in twin_prefix_attention.py.
To `torch.compile` the whole is one operation, forward and backward. Left out on purpose: dropout.

Letters: L packed tokens, h query heads, g query heads per key-value head, d head size (dv that of values), n segments,
w their width.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_kernels import backend, twin_prefix_attention
from distill_kernels.prefix_layout import PrefixLayout, layout_of


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout | Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[L, h, d], [L, h / g, d], [L, h / g, dv] to the attention's output [L, h, dv]; gradients to all, and to `sinks`.

    A token sees itself and the `window` - 1 tokens before it, its prompt's counted. `softcap` bounds the scaled scores:
    softcap * tanh(score / softcap). `sinks` [h] are logits that take part in the softmax, and nothing of the output.
    A layout's handle stands for it where `torch.compile` traces, to which the whole is one operation then.
    """
    return _PrefixAttention.apply(query, key, value, sinks, layout, (scale, window, softcap))


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        layout: PrefixLayout | Tensor,
        options: tuple[float | None, ...],
    ) -> Tensor:
        run = torch.ops.distill_kernels.prefix_attention if isinstance(layout, Tensor) else _forward
        out, lse = run(query, key, value, sinks, layout, *options)
        ctx.layout, ctx.options = layout, options
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        compiling = isinstance(ctx.layout, Tensor)
        run = torch.ops.distill_kernels.prefix_attention_backward if compiling else _backward
        *grads, grad_sinks = run(grad_out, *ctx.saved_tensors, ctx.layout, *ctx.options)
        return *grads, grad_sinks if ctx.needs_input_grad[3] else None, None, None


def _implementation(query: Tensor, value: Tensor) -> ModuleType:
    """What computes attention of these [L, h, d] tensors."""
    fits = max(query.shape[-1], value.shape[-1]) <= 256
    if query.is_cuda:
        fits = fits and query.dtype in (torch.float16, torch.bfloat16) and _is_recent(query.device)
    return backend.implementation("prefix_attention", query.device) if fits else twin_prefix_attention


@functools.cache
def _is_recent(device: torch.device) -> bool:
    """Whether a card computes with bfloat16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, layout: PrefixLayout, *options: float | None
) -> tuple[Tensor, Tensor]:
    """Output [L, h, dv], and log-sum-exps as the implementation keeps them."""
    _, window, _ = options
    layout.calls += 1
    layout.windowed_calls += window is not None
    return _implementation(query, value).forward(*_with_rows(query, key, value), sinks, layout, *options)


def _backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """Gradients to query, key, value and sinks; `rest` are sinks, what `_forward` gave, the layout and the options."""
    return _implementation(query, value).backward(*_with_rows(grad_out, query, key, value), *rest)


def _with_rows(*tensors: Tensor) -> list[Tensor]:
    """With a last stride of 1, which the kernels of both implementations take for granted."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


# --- the same two as ops, which a compiler does not look into: a layout's handle [1] in place of the layout ---

FORWARD, BACKWARD = "distill_kernels::prefix_attention", "distill_kernels::prefix_attention_backward"
OPTIONS = "Tensor layout, float scale, SymInt? window, float? softcap"
STRIDES = torch.Tag.needs_exact_strides  # those of the results follow from them
torch.library.define(
    FORWARD, f"(Tensor query, Tensor key, Tensor value, Tensor? sinks, {OPTIONS}) -> (Tensor, Tensor)", tags=(STRIDES,)
)
torch.library.define(
    BACKWARD,
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor out, Tensor lse, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(STRIDES,),
)


@torch.library.impl(FORWARD, "CompositeExplicitAutograd")
def _(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, layout: Tensor, *options: float | None):
    return _forward(query, key, value, sinks, layout_of(layout), *options)


@torch.library.impl(BACKWARD, "CompositeExplicitAutograd")
def _(*arguments: Tensor | float | None) -> tuple[Tensor, ...]:
    *grads, grad_sinks = _backward(*arguments[:7], layout_of(arguments[7]), *arguments[8:])
    return *grads, arguments[0].new_empty(0) if grad_sinks is None else grad_sinks


@torch.library.register_fake(FORWARD)
def _(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | float | None) -> tuple[Tensor, Tensor]:
    L, h, _ = query.shape
    statistics = _implementation(query, value).statistics_shape(L, h)
    lse = query.new_empty(statistics, dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(L, h, value.shape[-1]), lse


@torch.library.register_fake(BACKWARD)
def _(grad_out: Tensor, *arguments: Tensor | float | None) -> tuple[Tensor, ...]:
    query, key, value, sinks = arguments[:4]
    given = (each.new_empty(each.shape) for each in (query, key, value))
    return *given, grad_out.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
