"""Two models' heads over the same tokens: what every call of a fused operation on their hidden states shares.

A teacher on a server says log q(y) of the sampled tokens and no more: its head is one column of zeros, so that the
operations see equal logits, and `completed` puts what it said in their place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.loss.model_parts import ModelParts
from distill_kernels import TokenStats, linear_reverse_kl

AGREEMENT_TOKENS = 32  # of a micro-batch whose likeliest tokens are compared


class HeadPair(NamedTuple):
    """A student and one of its teachers, in the loss at one temperature."""

    student: ModelParts
    teacher: ModelParts
    temperature: float
    vocab_size: int | None

    def inputs(self, student_hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return student_hidden, self.student.head.weight, teacher_hidden, self.teacher.head.weight

    def theirs(self, teacher_hidden: Sequence[Tensor | None], rows: Tensor, student_hidden: Tensor) -> Tensor:
        """[k, Ht] of what `score` gave; 0 for a row that is computed only to take part, and counts for nothing."""
        if teacher_hidden[rows[0]] is None:
            return student_hidden.new_zeros(len(student_hidden), self.teacher.head.weight.shape[1])
        return torch.cat([teacher_hidden[row] for row in rows])

    def statistics(self, student_hidden: Tensor, teacher_hidden: Tensor, token_ids: Tensor) -> TokenStats:
        """Of K tokens, without gradients."""
        stats = linear_reverse_kl(*self.inputs(student_hidden, teacher_hidden), token_ids, **self.options())
        return self.completed(stats, teacher_hidden)

    def completed(self, stats: TokenStats, teacher_hidden: Tensor) -> TokenStats:
        """Statistics with what a teacher said that knows the sampled tokens only, whose head gives equal logits.

        What it cannot say, the exact reverse KL and its entropy, is NaN.
        """
        if not self.teacher.sampled_only:
            return stats
        logprob, unknown = teacher_hidden[:, 0], torch.full_like(stats.reward, torch.nan)
        reward = logprob - stats.student_logprob
        return stats._replace(teacher_logprob=logprob, reward=reward, reverse_kl=unknown, teacher_entropy=unknown)

    def options(self) -> dict:
        heads = self.student.head_arguments("student") | self.teacher.head_arguments("teacher")
        # Float32 weights are multiplied in the hidden states' precision; their gradient is float32 all the way.
        return {"temperature": self.temperature, "vocab_size": self.vocab_size, "cast_weights": True, **heads}

    @torch.no_grad()
    def agreement(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """[k] bool, k at most AGREEMENT_TOKENS: whether evenly spaced tokens have the same likeliest token."""
        if self.teacher.sampled_only:
            return torch.full((1,), torch.nan, device=student_hidden.device)
        every = max(1, -(-len(student_hidden) // AGREEMENT_TOKENS))
        top = (
            model.head.logits(hidden[::every])[:, : self.vocab_size].argmax(-1)
            for model, hidden in ((self.student, student_hidden), (self.teacher, teacher_hidden))
        )
        return next(top) == next(top)
