"""`reverse_kl`: statistics of sampled tokens from two models' logits, with gradients to the student's.

At z = logits / temperature, p = softmax(z_s), q = softmax(z_t), y the token, in one read of each row with an online
maximum m and sums S = sum e^(z-m), S1 = sum e^(z_s-m_s) ((z_s-m_s) - (z_t-m_t)), S2 = sum e^(z-m) (z-m):

    log p(y) = z_s(y) - m_s - log S_s        KL(p || q) = S1 / S_s - log S_s + log S_t
    H(p)     = log S_s - S2 / S_s            reward     = log q(y) - log p(y), a constant

and in the backward pass, with upstream gradients g of log p(y), KL and H:

    dz_s = g_logprob (onehot(y) - p) + g_KL p (log p - log q - KL) - g_H p (log p + H)

Bytes: forward K (Vs + Vt) w, backward K (2 Vs + Vt) w, w bytes a logit; some 15 FLOPs a logit, far below the limit.
The gradient is a new tensor and never overwrites the logits: autograd cannot tell whether someone still reads them.
"""

import torch
from torch import Tensor

from distill_kernels import backend, checks
from distill_kernels.chunks import accumulation_dtype
from distill_kernels.types import TokenStats


@torch.library.custom_op("distill_kernels::reverse_kl", mutates_args=())
def _reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """[6, K] statistics in the order of `TokenStats`, and [4, K] for the backward pass: m and log S of both models."""
    checks.check_token_ids(token_ids, vocab_size)
    return backend.implementation("reverse_kl", student_logits.device).reverse_kl_forward(
        student_logits[:, :vocab_size], teacher_logits[:, :vocab_size], token_ids, temperature
    )


@_reverse_kl.register_fake
def _(student_logits, teacher_logits, token_ids, temperature, vocab_size) -> tuple[Tensor, Tensor]:
    dtype, K = accumulation_dtype(student_logits, teacher_logits), student_logits.shape[0]
    return student_logits.new_empty((6, K), dtype=dtype), student_logits.new_empty((4, K), dtype=dtype)


@torch.library.custom_op("distill_kernels::reverse_kl_backward", mutates_args=())
def _reverse_kl_backward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    stats: Tensor,
    normalisers: Tensor,
    upstream: Tensor,
    temperature: float,
    vocab_size: int,
) -> Tensor:
    """Gradient [K, Vs] of the student's logits for upstream gradients [6, K] of the statistics."""
    gradient = torch.empty(student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)
    gradient[:, vocab_size:] = 0
    backend.implementation("reverse_kl", student_logits.device).reverse_kl_backward(
        student_logits[:, :vocab_size],
        teacher_logits[:, :vocab_size],
        token_ids,
        stats,
        normalisers,
        upstream,
        gradient[:, :vocab_size],
        temperature,
    )
    return gradient


@_reverse_kl_backward.register_fake
def _(student_logits, *_) -> Tensor:
    return torch.empty(student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)


def _setup_context(ctx, inputs, output) -> None:
    student_logits, teacher_logits, token_ids, ctx.temperature, ctx.vocab_size = inputs
    ctx.save_for_backward(student_logits, teacher_logits, token_ids, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream: Tensor, _) -> tuple[Tensor | None, ...]:
    gradient = None
    if ctx.needs_input_grad[0]:
        gradient = _reverse_kl_backward(*ctx.saved_tensors, upstream, ctx.temperature, ctx.vocab_size)
    return gradient, None, None, None, None


torch.library.register_autograd("distill_kernels::reverse_kl", _backward, setup_context=_setup_context)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TokenStats:
    """Statistics of K tokens, [K] float32 each, in nats.

    student_logits [K, Vs] and teacher_logits [K, Vt]: float32, bfloat16 or float16, float64 on a CPU, with any
    strides; token_ids [K] int64. `student_logprob`, `reverse_kl` and `student_entropy` carry gradients to
    student_logits; the other fields carry none. `vocab_size` is the number of leading columns that both models
    share, and may be absent where Vs = Vt; columns past it have gradient 0. All is at logits / temperature.
    A token whose reverse KL is infinite (logit -inf in the teacher alone) has gradient 0 of it.

    Raises ValueError for a wrong shape, dtype, device or number, IndexError for a token id out of range (on CUDA
    only after `checks.check_cuda_values(True)`).
    """
    checks.check_floats(student_logits=student_logits, teacher_logits=teacher_logits)
    checks.check_matrix("student_logits", student_logits, "K, V")
    checks.check_matrix("teacher_logits", teacher_logits, "K, V")
    checks.check_same_rows("student_logits", student_logits, "teacher_logits", teacher_logits)
    V = checks.resolve_vocab_size(vocab_size, student_logits.shape[1], teacher_logits.shape[1])
    checks.check_vector("token_ids", token_ids, student_logits.shape[0], f"student_logits {list(student_logits.shape)}")
    checks.check_integers("token_ids", token_ids, student_logits.device)
    checks.check_positive("temperature", temperature)
    stats, _ = _reverse_kl(student_logits, teacher_logits.detach(), token_ids, temperature, V)
    constant = stats.detach()
    return TokenStats(stats[0], constant[1], constant[2], stats[3], stats[4], constant[5])
