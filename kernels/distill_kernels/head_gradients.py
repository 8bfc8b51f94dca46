"""The gradients of a head's hidden states, weight and bias: made chunk by chunk as an op runs, given to autograd.

A fused loss is linear in the losses of its tokens with known weights, so all its backward pass does is to multiply what
its forward pass has made by the upstream gradient, one number.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distill_kernels.chunks import HeadProducts, chunks, row_buffer, rows_per_chunk

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss [], statistics [6, K], and the gradients of hidden states [K, H], weight [V, H] and bias [V], each or empty."""


def new_outputs(hidden: Tensor, weight: Tensor, needed: list[bool], dtype: torch.dtype) -> Gradients:
    """Outputs of an op in the dtype of its accumulation, uninitialised."""
    K, (V, H) = hidden.shape[0], weight.shape
    shapes = ((), (6, K), (K, H) if needed[0] else (0,), (V, H) if needed[1] else (0,), (V,) if needed[2] else (0,))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def student_chunks(
    student: HeadProducts, hidden: Tensor, gradient: bool, workspace_bytes: int | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Chunks of rows of hidden states [K, H], with their logits [k, V] and the room for the logits' gradient, if there
    is to be one: the logits' own, if the products take what the logits are. Each is to be let go of before the next."""
    (V, _), dtype, operand, device = student.weight.shape, student.accumulate, student.operand, hidden.device
    rounded = gradient and operand != dtype
    rows = rows_per_chunk(len(hidden), V, dtype.itemsize + rounded * operand.itemsize, workspace_bytes, device)
    room, half = student.room(rows), row_buffer(rows, V, operand, device) if rounded else None
    for part in chunks(len(hidden), rows):
        logits = student.logits(hidden[part], room)
        grad = None if not gradient else logits if half is None else half[: len(logits)]
        yield part, logits, grad
        del logits, grad


def weighted_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """The sum of what counts: a token of weight 0 adds nothing, whatever its loss is."""
    return (weights * losses.masked_fill(weights == 0, 0)).sum()


def write_gradients(
    head: HeadProducts,
    grad: Tensor,
    hidden: Tensor,
    part: slice,
    factor: Tensor,
    needed: list[bool],
    gradients: Sequence[Tensor],
    token_ids: Tensor,
    lost: Tensor | None,
) -> None:
    """A chunk's gradients of hidden states, weight and bias, by its logits' gradient factor [k] * grad [k, V].

    The first chunk writes the weight's, the others add to it. `lost` [K], what rounding took from each row's entry at
    its token, is given back in float32: most of p - onehot is that entry, whose rounding would not average out.
    """
    d_hidden, d_weight, d_bias = gradients
    V = len(head.weight)
    if needed[0]:
        head.hidden_gradient(grad, d_hidden[part]).mul_(factor[:, None])
    if needed[1]:
        scaled = hidden[part] * factor[:, None]
        head.weight_gradient(grad, scaled, d_weight[:V], first=part.start == 0)
    if needed[2]:
        head.bias_gradient(grad, factor, d_bias[:V])
    if lost is None:
        return
    ids = token_ids[part].clamp(0, V - 1)  # for an id outside the vocabulary nothing is lost
    own = lost[part] * factor
    if needed[0]:
        d_hidden[part].addcmul_(own[:, None], head.weight[ids])
    # Not `index_add_`, whose order on CUDA is another each time.
    if needed[1]:
        d_weight.index_put_((ids,), own[:, None] * hidden[part], accumulate=True)
    if needed[2]:
        d_bias.index_put_((ids,), own, accumulate=True)


def register_gradients(op: torch.library.CustomOpDef, needed: int) -> None:
    """Has autograd take the gradients that `op` makes of its first three inputs, hidden states, weight and bias; its
    input at index `needed` says which of them."""

    def keep(ctx, inputs, output: Gradients) -> None:
        ctx.others = len(inputs) - 3
        _keep_gradients(ctx, inputs[:3], inputs[needed], output)

    def scale(ctx, upstream: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        return *_scaled_gradients(ctx, upstream), *[None] * ctx.others

    op.register_autograd(scale, setup_context=keep)


def _keep_gradients(ctx, trained: Sequence[Tensor | None], needed: list[bool], output: Gradients) -> None:
    """For the backward pass; `trained` are hidden states, weight and bias, as the op was given them."""
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in trained]
    ctx.needed = needed
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    # Else autograd makes zeros as large as the weight for the outputs without gradient.
    ctx.set_materialize_grads(False)


def _scaled_gradients(ctx, upstream: Tensor | None) -> list[Tensor | None]:
    """The three gradients, None for one that is not needed, and for a loss that nothing depends on."""
    if upstream is None:
        return [None] * 3
    one = _known_to_be_one(upstream)
    return [
        None if not needed else gradient.to(dtype) if one else _product(gradient, upstream, dtype)
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True)
    ]


def _product(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream in `dtype`, in one pass and without a float32 tensor of the weight's size.

    A new tensor even where the dtype stays: the saved one may be asked for again (`retain_graph`).
    """
    if upstream.requires_grad:  # of a backward pass that is itself differentiated, which takes no `out`
        return (gradient * upstream).to(dtype)
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))


def _known_to_be_one(upstream: Tensor) -> bool:
    """Whether to multiply by it would only copy the weight's gradient, as of a loss that is itself differentiated.

    Not asked of a tensor elsewhere, whose answer would be waited for, nor of one that is only traced.
    """
    return upstream.device.type == "cpu" and type(upstream) is Tensor and upstream.item() == 1
