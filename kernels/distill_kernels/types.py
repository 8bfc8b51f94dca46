"""What the ops take and return beside plain tensors. K tokens, R rows, V vocabulary columns."""

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per token, each [K] float32 (float64 for float64 inputs), in nats."""

    student_logprob: Tensor
    """log p_student(y) at the token's id."""
    teacher_logprob: Tensor
    """log p_teacher(y) at the token's id."""
    reward: Tensor
    """teacher_logprob - student_logprob, without gradient; 0 where both are -inf."""
    reverse_kl: Tensor
    """sum over v of p_student(v) (log p_student(v) - log p_teacher(v)), over the whole vocabulary."""
    student_entropy: Tensor
    teacher_entropy: Tensor


class Sample(NamedTuple):
    """One drawn token a row."""

    token_ids: Tensor
    """[R] int64."""
    logprob: Tensor
    """[R] float32, nats: of the plain softmax, whatever the temperature and the filters."""
    sampling_logprob: Tensor
    """[R] float32, nats: of the distribution the token was drawn from."""


class Head(NamedTuple):
    """How a head turns its product h W^T into logits: softcap(scale * (h W^T + bias))."""

    bias: Tensor | None
    """[V], or None."""
    softcap: float | None
    """c in c * tanh(x / c), or None."""
    scale: float

    def first(self, V: int) -> "Head":
        """On its first V columns."""
        return self if self.bias is None else self._replace(bias=self.bias[:V])


class TopTokens(NamedTuple):
    """The likeliest tokens that a teacher names at each of K places; the first is one, others may be absent."""

    token_ids: Tensor
    """[K, k] int64, -1 for none."""
    logprob: Tensor
    """[K, k] nats, at the student's temperature; -inf for none."""


class Norm(NamedTuple):
    """An RMS norm: weight * x / sqrt(mean(x^2) + eps)."""

    weight: Tensor
    """[H]."""
    eps: float


class Stream(NamedTuple):
    """What goes from layer to layer in a decode step, with what the next layer's norm makes of it but for its root."""

    hidden: Tensor
    """x, [R, H]."""
    scaled: Tensor
    """x times the norm's weight, [R, H]."""
    squares: Tensor
    """The sums of x^2 over some parts of a row, float32 [parts, R]."""


OBJECTIVES = ("sampled_reverse_kl", "reverse_kl", "forward_kl", "jsd")
"""The objectives of `linear_distill_loss`; the position is the code that kernels and custom ops receive."""
