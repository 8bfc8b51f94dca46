"""Two models' heads over the same tokens: what every call of a fused operation on their hidden states shares.

A teacher on a server says log q(y) of the sampled tokens, and of its likeliest where it is asked: it has no head here,
and what it said takes the place of its hidden states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distill.forward import OneDnnLinears
from distill.loss.model_parts import ModelParts
from distill_kernels import TokenStats, TopTokens, linear_distill_loss, linear_reverse_kl

AGREEMENT_TOKENS = 32  # of a micro-batch whose likeliest tokens are compared

TeacherStates = dict[tuple[int, int], Tensor]  # by teacher and row: hidden states [T_r, Ht]


class HeadPair(NamedTuple):
    """A student and one of its teachers, in the loss at one temperature."""

    student: ModelParts
    teacher: ModelParts
    temperature: float
    vocab_size: int | None

    def theirs(self, found: TeacherStates, teacher: int, rows: Tensor, student_hidden: Tensor) -> Tensor:
        """[k, Ht] of what `score` found; 0 for a row that is computed only to take part, and counts for nothing."""
        if (teacher, int(rows[0])) not in found:
            width = self.teacher.width if self.teacher.head is None else self.teacher.head.weight.shape[1]
            return student_hidden.new_zeros(len(student_hidden), width)
        return torch.cat([found[teacher, row] for row in rows.tolist()])

    def statistics(self, student_hidden: Tensor, teacher_hidden: Tensor, token_ids: Tensor) -> TokenStats:
        """Of K tokens, without gradients; NaN where the teacher does not say."""
        teacher, options = self._teacher(teacher_hidden)
        return linear_reverse_kl(student_hidden, self.student.head.weight, *teacher, token_ids, **options)

    def loss(
        self, student_hidden: Tensor, teacher_hidden: Tensor, token_ids: Tensor, token_weight: Tensor, **objective
    ) -> tuple[Tensor, TokenStats]:
        """`linear_distill_loss` of K tokens with the options of its `objective`, and the detached statistics."""
        teacher, options = self._teacher(teacher_hidden)
        sampled = objective.get("objective") in (None, "sampled_reverse_kl")
        if self.teacher.silent:  # the tokens' cross entropy, whatever else is asked
            objective = {"advantage": torch.ones_like(token_weight)}
            options |= {"teacher_logprob": None, "temperature": 1.0}
        elif self.teacher.head is None and not sampled and (top := self.teacher.named(teacher_hidden)):
            options["teacher_top"] = TopTokens(*top)
        inputs = student_hidden, self.student.head.weight, *teacher, token_ids, token_weight
        return linear_distill_loss(*inputs, **objective, **options)

    def _teacher(self, teacher_hidden: Tensor) -> tuple[tuple[Tensor | None, Tensor | None], dict]:
        """The teacher's two tensors as a fused operation takes them, and the options of both heads."""
        # Float32 weights are multiplied in the hidden states' precision; their gradient is float32 all the way.
        options = {"temperature": self.temperature, "vocab_size": self.vocab_size, "cast_weights": True}
        options |= self.student.head_arguments("student")
        if self.teacher.head is None:
            return (None, None), options | {"teacher_logprob": teacher_hidden[:, 0]}
        return (teacher_hidden, self.teacher.head.weight), options | self.teacher.head_arguments("teacher")

    @torch.no_grad()
    def agreement(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """[k] bool, k at most AGREEMENT_TOKENS: whether evenly spaced tokens have the same likeliest token."""
        if self.teacher.head is None:
            return torch.full((0 if self.teacher.silent else 1,), torch.nan, device=student_hidden.device)
        every = max(1, -(-len(student_hidden) // AGREEMENT_TOKENS))
        with OneDnnLinears():
            student, teacher = (
                model.head.logits(hidden[::every])[:, : self.vocab_size].argmax(-1)
                for model, hidden in ((self.student, student_hidden), (self.teacher, teacher_hidden))
            )
        return student == teacher
