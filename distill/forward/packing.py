"""How ragged rows are laid out for the model, decided on the host from lengths alone.

All index tensors are built on the CPU. Token indices point into the flattened prompts [B * P] followed by the flattened
completions [R * T], so that one gather makes the model's input. Left out on purpose: models, and anything on a device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.runtime import host_integers
from distill_kernels import Shared

# A padded sub-batch is closed when a shorter row would make more than this share of its tokens padding.
MAX_PADDING = 0.1


class Rows(NamedTuple):
    """Lengths of a batch as plain integers; row r completes prompt `prompt_index[r]`."""

    prompt_lengths: list[int]
    completion_lengths: list[int]
    prompt_index: list[int]

    def fed(self, row: int) -> int:
        """Completion tokens the model is given: all but the last, which predicts nothing."""
        return max(self.completion_lengths[row] - 1, 0)

    def length(self, row: int) -> int:
        """Tokens of a row the model is given, prompt included."""
        return self.prompt_lengths[self.prompt_index[row]] + self.fed(row)

    def longest(self) -> int:
        """Tokens of the longest row, prompt included."""
        return max(self.length(row) for row in range(len(self.prompt_index)))

    def packed_tokens(self) -> int:
        """Tokens computed when each prompt is computed once."""
        prompts = sum(self.prompt_lengths[prompt] for prompt in set(self.prompt_index))
        return prompts + sum(self.fed(row) for row in range(len(self.prompt_index)))


class Packed(NamedTuple):
    """One row of packed tokens, in which prompts come before the completions that share them."""

    source: Tensor  # [L] int64, where each token comes from
    positions: Tensor  # [L] int64
    states: Tensor  # [K] int64, the positions among the L whose hidden states were asked for
    segments: list[int]  # lengths of the causal segments, in order
    shared: list[Shared]


class Padded(NamedTuple):
    """A sub-batch of rows padded on the right."""

    source: Tensor  # [n, width] int64; padding points at token 0
    states: Tensor  # [k] int64, into the flattened [n * width] hidden states


def host_rows(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_lengths: Tensor | Sequence[int],
    prompt_index: Tensor | Sequence[int],
) -> Rows:
    """The lengths of a batch (arguments as in `completion_hidden`). Raises ValueError when they do not fit together."""
    B, _ = prompt_ids.shape
    R, T = completion_ids.shape
    rows = Rows(host_integers(prompt_mask.sum(1)), host_integers(completion_lengths), host_integers(prompt_index))
    if R == 0 or len(rows.completion_lengths) != R or len(rows.prompt_index) != R:
        raise ValueError(
            f"completion_ids has {R} rows, completion_lengths {len(rows.completion_lengths)} and prompt_index "
            f"{len(rows.prompt_index)}: give one entry a row, and at least one row"
        )
    if min(rows.prompt_index) < 0 or max(rows.prompt_index) >= B:
        low, high = min(rows.prompt_index), max(rows.prompt_index)
        raise ValueError(f"prompt_index must lie in 0..{B - 1}, found {low} to {high}")
    if min(rows.completion_lengths) < 0 or max(rows.completion_lengths) > T:
        low, high = min(rows.completion_lengths), max(rows.completion_lengths)
        raise ValueError(f"completion_lengths must lie in 0..{T}, the width of completion_ids, found {low} to {high}")
    if any(rows.prompt_lengths[prompt] == 0 for prompt in rows.prompt_index):
        raise ValueError("a prompt has no token: there is nothing to predict its completion's first token from")
    return rows


def length_buckets(rows: Rows, max_padding: float = MAX_PADDING) -> list[list[int]]:
    """Rows sorted by length, longest first, in runs in which padding stays under `max_padding` of the tokens."""
    buckets: list[list[int]] = []
    real = 0
    for row in sorted(range(len(rows.prompt_index)), key=lambda row: -rows.length(row)):
        length = rows.length(row)
        if buckets:
            padded = (len(buckets[-1]) + 1) * rows.length(buckets[-1][0])
            if padded - (real + length) <= max_padding * padded:
                buckets[-1].append(row)
                real += length
                continue
        buckets.append([row])
        real = length
    return buckets


def pad(rows: Rows, buckets: list[list[int]], P: int, T: int) -> tuple[list[Padded], Tensor]:
    """The sub-batches, and the order [K] int64 that sorts their concatenated states by row."""
    B = len(rows.prompt_lengths)
    starts = [0]  # where each row's states begin among all K
    for length in rows.completion_lengths:
        starts.append(starts[-1] + length)
    batches, order, filled = [], torch.empty(starts[-1], dtype=torch.int64), 0
    for bucket in buckets:
        width = rows.length(bucket[0])
        source = torch.zeros(len(bucket), width, dtype=torch.int64)
        states = []
        for i, row in enumerate(bucket):
            prompt = rows.prompt_index[row]
            p, t, fed = rows.prompt_lengths[prompt], rows.completion_lengths[row], rows.fed(row)
            source[i, :p] = torch.arange((prompt + 1) * P - p, (prompt + 1) * P)
            source[i, p : p + fed] = torch.arange(row * T, row * T + fed) + B * P
            states.append(torch.arange(t) + (i * width + p - 1))
            order[starts[row] : starts[row + 1]] = torch.arange(filled, filled + t)
            filled += t
        batches.append(Padded(source, torch.cat(states)))
    return batches, order


def pack(rows: Rows, P: int, T: int) -> Packed:
    """Every prompt once and every completion, without padding.

    Order: prompts with several completions, prompts with one (a single segment with it, as sharing would only add a
    merge) or none, then the completions of the first, prompt by prompt and longest first.
    """
    B = len(rows.prompt_lengths)
    members: dict[int, list[int]] = {prompt: [] for prompt in rows.prompt_index}
    for row, prompt in enumerate(rows.prompt_index):
        if rows.fed(row):
            members[prompt].append(row)
    source, positions, segments, shared = [], [], [], []
    prompt_at, row_at, at = {}, {}, 0

    def add(first: int, length: int, position: int) -> int:
        nonlocal at
        source.append(torch.arange(first, first + length))
        positions.append(torch.arange(position, position + length))
        at += length
        return at - length

    for prompt in sorted(members, key=lambda prompt: len(members[prompt]) < 2):
        p = rows.prompt_lengths[prompt]
        prompt_at[prompt] = add((prompt + 1) * P - p, p, 0)
        segments.append(p)
        if len(members[prompt]) == 1:
            (row,) = members[prompt]
            row_at[row] = add(B * P + row * T, rows.fed(row), p)
            segments[-1] += rows.fed(row)
    for prompt, group in members.items():
        if len(group) < 2:
            continue
        p, begin = rows.prompt_lengths[prompt], at
        for row in sorted(group, key=lambda row: -rows.fed(row)):
            segments.append(rows.fed(row))
            row_at[row] = add(B * P + row * T, segments[-1], p)
        shared.append(Shared(prompt_at[prompt], p, begin, at - begin))

    states = [torch.empty(0, dtype=torch.int64)]
    for row, prompt in enumerate(rows.prompt_index):
        if rows.completion_lengths[row]:
            states.append(torch.tensor([prompt_at[prompt] + rows.prompt_lengths[prompt] - 1]))
        if row in row_at:
            states.append(torch.arange(row_at[row], row_at[row] + rows.fed(row)))
    return Packed(torch.cat(source), torch.cat(positions), torch.cat(states), segments, shared)
