"""Fused operations of on-policy distillation: tensors in, tensors out. `reference` states what each one means."""

from distill_kernels import reference
from distill_kernels.decode_attention import decode_attention
from distill_kernels.decode_linear import added, begun, normed_gate, normed_heads
from distill_kernels.linear_distill_loss import linear_distill_loss
from distill_kernels.linear_reverse_kl import linear_reverse_kl
from distill_kernels.prefix_attention import prefix_attention
from distill_kernels.prefix_layout import PrefixLayout, Shared
from distill_kernels.record_draw import record_draw
from distill_kernels.reverse_kl import reverse_kl
from distill_kernels.sample import sample
from distill_kernels.types import Norm, Sample, TokenStats, TopTokens

__all__ = [
    "Norm",
    "PrefixLayout",
    "Sample",
    "Shared",
    "TokenStats",
    "TopTokens",
    "added",
    "begun",
    "decode_attention",
    "linear_distill_loss",
    "linear_reverse_kl",
    "normed_gate",
    "normed_heads",
    "prefix_attention",
    "record_draw",
    "reference",
    "reverse_kl",
    "sample",
]
