"""`linear_reverse_kl`: scores tokens from hidden states and head weights, without gradients.

    z_s = softcap(scale (h_s W_s^T + b_s)) / temperature, z_t alike; the statistics of `reverse_kl` of z_s and z_t.

No [K, V] tensor exists: chunks of rows go through one matrix product a model into two float32 buffers, which one
row kernel reads once. FLOPs: 2 K V (Hs + Ht). Bytes: each weight once a chunk, and 2 x 8 K V for the buffers
(written by the product, read by the kernel), which is what separates it from the products' own time.
Extra memory: the workspace of `chunks.WORKSPACE_BYTES`, whatever K is.
"""

import torch
from torch import Tensor

from distill_kernels import backend, checks
from distill_kernels.chunks import HeadProducts, accumulation_dtype, chunks, rows_per_chunk
from distill_kernels.linear_student_loss import linear_student_loss
from distill_kernels.types import Head, TokenStats


@torch.library.custom_op("distill_kernels::linear_reverse_kl", mutates_args=())
def _linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_scale: float,
    teacher_scale: float,
    temperature: float,
    vocab_size: int,
    workspace_bytes: int | None,
    cast_weights: bool,
) -> Tensor:
    """[6, K] statistics in the order of `TokenStats`."""
    checks.check_token_ids(token_ids, vocab_size)
    K, V, device = student_hidden.shape[0], vocab_size, student_hidden.device
    dtype = accumulation_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    student = HeadProducts(student_weight[:V], student_hidden, dtype, cast_weights)
    teacher = HeadProducts(teacher_weight[:V], teacher_hidden, dtype, cast_weights)
    rows = rows_per_chunk(K, V, 2 * dtype.itemsize, workspace_bytes, device)
    rooms = student.room(rows), teacher.room(rows)
    stats = torch.empty(6, K, dtype=dtype, device=device)
    for part in chunks(K, rows):
        backend.implementation("rows", device).token_stats(
            student.logits(student_hidden[part], rooms[0]),
            teacher.logits(teacher_hidden[part], rooms[1]),
            token_ids[part],
            stats[:, part],
            temperature=temperature,
            student_head=Head(student_bias, student_softcap, student_scale).first(V),
            teacher_head=Head(teacher_bias, teacher_softcap, teacher_scale).first(V),
        )
    return stats


@_linear_reverse_kl.register_fake
def _(student_hidden, student_weight, teacher_hidden, teacher_weight, *_) -> Tensor:
    dtype = accumulation_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    return student_hidden.new_empty((6, student_hidden.shape[0]), dtype=dtype)


def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    token_ids: Tensor,
    *,
    teacher_logprob: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    workspace_bytes: int | None = None,
    cast_weights: bool = False,
) -> TokenStats:
    """Statistics of K tokens under two heads, [K] float32 each, in nats, never with gradients.

    student_hidden [K, Hs], student_weight [Vs, Hs], teacher_hidden [K, Ht], teacher_weight [Vt, Ht]: float32,
    bfloat16 or float16, float64 on a CPU; each may have its own (a product runs in the wider of its two, or with
    `cast_weights` in the hidden states' dtype).
    token_ids [K] int64. `vocab_size` is the number of leading columns that both models share, and may be absent
    where Vs = Vt. logits = softcap(scale * (h W^T + bias)), bias [V]; all statistics are at logits / temperature.
    `workspace_bytes` bounds the logits buffers. A teacher elsewhere: teacher_hidden and teacher_weight are None,
    teacher_logprob [K], nats, is what it says of the tokens at this temperature, and what it cannot say is NaN.

    Raises ValueError for a wrong shape, dtype, device or number, IndexError for a token id out of range (on CUDA
    only after `checks.check_cuda_values(True)`).
    """
    V = checks.check_linear(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        token_ids,
        vocab_size,
        vectors={"teacher_logprob": teacher_logprob},
        numbers={
            "temperature": temperature,
            "student_softcap": student_softcap,
            "teacher_softcap": teacher_softcap,
        },
        teacher_scale=teacher_scale,
    )
    with torch.no_grad():
        if teacher_hidden is None:
            student = (student_hidden, student_weight, student_bias)
            weights = student_hidden.new_zeros(len(student_hidden))
            options = (temperature, V, student_softcap, student_scale, workspace_bytes, cast_weights)
            _, stats, *_ = linear_student_loss(
                *student, token_ids, weights, teacher_logprob, None, None, None, [False] * 3, None, *options
            )
            return TokenStats(*stats.unbind(0))
        stats = _linear_reverse_kl(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            token_ids,
            student_bias,
            teacher_bias,
            student_softcap,
            teacher_softcap,
            student_scale,
            teacher_scale,
            temperature,
            V,
            workspace_bytes,
            cast_weights,
        )
    return TokenStats(*stats.unbind(0))
