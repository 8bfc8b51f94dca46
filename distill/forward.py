"""Hidden states that predict the completion tokens of a batch of rollouts, for student and teacher alike.

Every padding token is cut away: rows are described by lengths that the host knows, so that nothing here waits
for an accelerator, and no mask is compared with `pad_token_id`. Left out on purpose: logits and losses, which
live behind the head, and any change to the model that outlasts a call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# A padded sub-batch is closed when a shorter row would make more than this share of its tokens padding.
MAX_PADDING = 0.1


class Rows(NamedTuple):
    """Lengths of a batch as plain integers; row r completes prompt `prompt_index[r]`."""

    prompt_lengths: list[int]
    completion_lengths: list[int]
    prompt_index: list[int]


def completion_hidden(
    body: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_lengths: Tensor | Sequence[int],
    prompt_index: Tensor | Sequence[int],
) -> Tensor:
    """Hidden states [K, H] from which each valid completion token is predicted, row 0's tokens first.

    `prompt_ids` [B, P] int64 is left-padded and `prompt_mask` [B, P] bool marks its tokens; `completion_ids` [R, T]
    int64 is right-padded and `completion_lengths` [R] counts its tokens; `prompt_index` [R] names each row's prompt.
    The first token's state is that of the last prompt token; gradients flow when grad mode is on. Mask, lengths and
    index are read on the host: keep them on the CPU (or as lists) and an accelerator is never waited for.
    Raises ValueError when they do not fit together.
    """
    rows = _host_rows(prompt_ids, prompt_mask, completion_ids, completion_lengths, prompt_index)
    return padded_hidden(body, prompt_ids, completion_ids, rows)


def padded_hidden(body: nn.Module, prompt_ids: Tensor, completion_ids: Tensor, rows: Rows) -> Tensor:
    """The plain way to `completion_hidden`: each row is its prompt and completion, computed by the model as it is.

    Rows are padded on the right, where no causal layer looks, so the model needs neither mask nor position ids.
    """
    P, T = prompt_ids.shape[1], completion_ids.shape[1]
    token_ids = torch.cat([prompt_ids.reshape(-1), completion_ids.reshape(-1)])
    starts = [0]  # where each row's hidden states begin among the flattened valid ones
    for length in rows.completion_lengths:
        starts.append(starts[-1] + length)
    states, order = [], torch.empty(starts[-1], dtype=torch.int64)
    filled = 0
    for bucket in _length_buckets(rows):
        width = _row_length(rows, bucket[0])
        source = torch.zeros(len(bucket), width, dtype=torch.int64)
        picked = []
        for i, row in enumerate(bucket):
            prompt = rows.prompt_index[row]
            p, t = rows.prompt_lengths[prompt], rows.completion_lengths[row]
            source[i, :p] = torch.arange((prompt + 1) * P - p, (prompt + 1) * P)
            fed = max(t - 1, 0)  # the last token predicts nothing
            source[i, p : p + fed] = torch.arange(row * T, row * T + fed) + len(prompt_ids) * P
            picked.append(torch.arange(t) + (i * width + p - 1))
            order[starts[row] : starts[row + 1]] = torch.arange(filled, filled + t)
            filled += t
        source, index = to_device([source, torch.cat(picked)], prompt_ids.device)
        hidden = body(input_ids=token_ids[source], use_cache=False).last_hidden_state
        states.append(hidden.flatten(0, 1)[index])
    return torch.cat(states)[to_device([order], prompt_ids.device)[0]]


def micro_batches(
    prompt_lengths: Tensor | Sequence[int],
    completion_lengths: Tensor | Sequence[int],
    prompt_index: Tensor | Sequence[int],
    token_budget: int,
) -> list[Tensor]:
    """Row indices [n] int64 (CPU) of each micro-batch of at most `token_budget` tokens; every row is in exactly one.

    A micro-batch counts each of its prompts once and all its completions. Rows of a prompt stay together where
    they fit, else they are spread evenly over as few micro-batches as hold them; a row that exceeds the budget by
    itself gets a micro-batch of its own. Raises ValueError unless the budget is positive.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1 token, found {token_budget}")
    prompts, completions = host_integers(prompt_lengths), host_integers(completion_lengths)
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(host_integers(prompt_index)):
        groups.setdefault(prompt, []).append(row)
    batches: list[list[int]] = []
    room = 0
    for prompt, group in groups.items():
        for part in _split_group(group, prompts[prompt], completions, token_budget):
            cost = prompts[prompt] + sum(completions[row] for row in part)
            if cost > room:
                batches.append([])
                room = token_budget
            batches[-1] += part
            room -= cost
    return [torch.tensor(batch, dtype=torch.int64) for batch in batches]


def _split_group(group: list[int], prompt: int, completions: list[int], budget: int) -> list[list[int]]:
    """Cuts one prompt's rows into consecutive parts that each fit the budget with the prompt, evenly filled."""
    total = sum(completions[row] for row in group)
    parts_wanted = max(1, -(-total // max(1, budget - prompt)))
    goal = total / parts_wanted
    parts, used, before = [[]], 0, 0
    for row in group:
        length = completions[row]
        # A part also ends once it holds its share of the whole, so that the last one is not a remainder.
        if parts[-1] and (used + length > budget - prompt or before >= goal * len(parts)):
            parts.append([])
            used = 0
        parts[-1].append(row)
        used += length
        before += length
    return parts


def _length_buckets(rows: Rows) -> list[list[int]]:
    """Rows sorted by length, longest first, in runs in which padding stays under MAX_PADDING of the tokens."""
    lengths = [_row_length(rows, row) for row in range(len(rows.prompt_index))]
    buckets: list[list[int]] = []
    real = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if buckets:
            padded = (len(buckets[-1]) + 1) * lengths[buckets[-1][0]]
            if padded - (real + lengths[row]) <= MAX_PADDING * padded:
                buckets[-1].append(row)
                real += lengths[row]
                continue
        buckets.append([row])
        real = lengths[row]
    return buckets


def _row_length(rows: Rows, row: int) -> int:
    """Tokens of a row that the model is given: the prompt, and all but the last of the completion."""
    return rows.prompt_lengths[rows.prompt_index[row]] + max(rows.completion_lengths[row] - 1, 0)


def host_integers(values: Tensor | Sequence[int]) -> list[int]:
    """Plain integers of a list or of a tensor; only a tensor on an accelerator makes the host wait."""
    return values.tolist() if isinstance(values, Tensor) else list(values)


def to_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on `device`, copied without making the host wait."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


def _host_rows(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_lengths: Tensor | Sequence[int],
    prompt_index: Tensor | Sequence[int],
) -> Rows:
    B, _ = prompt_ids.shape
    R, T = completion_ids.shape
    rows = Rows(host_integers(prompt_mask.sum(1)), host_integers(completion_lengths), host_integers(prompt_index))
    if R == 0 or len(rows.completion_lengths) != R or len(rows.prompt_index) != R:
        raise ValueError(
            f"completion_ids has {R} rows, completion_lengths {len(rows.completion_lengths)} and prompt_index "
            f"{len(rows.prompt_index)}: give one entry a row, and at least one row"
        )
    if min(rows.prompt_index) < 0 or max(rows.prompt_index) >= B:
        raise ValueError(f"prompt_index must lie in 0..{B - 1}, found up to {max(rows.prompt_index)}")
    if min(rows.completion_lengths) < 0 or max(rows.completion_lengths) > T:
        raise ValueError(f"completion_lengths must lie in 0..{T}, the width of completion_ids")
    if any(rows.prompt_lengths[prompt] == 0 for prompt in rows.prompt_index):
        raise ValueError("a prompt has no token: there is nothing to predict its completion's first token from")
    return rows
