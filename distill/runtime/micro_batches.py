"""How the rows of a group are cut into micro-batches that fit the memory: by their lengths alone, on the host."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
        share_held = len(parts) < parts_wanted and before >= goal * len(parts)
        if parts[-1] and (used + length > budget - prompt or share_held):
            parts.append([])
            used = 0
        parts[-1].append(row)
        used += length
        before += length
    return parts


def host_integers(values: Tensor | Sequence[int]) -> list[int]:
    """Plain integers of a list or of a tensor; only a tensor on an accelerator makes the host wait."""
    return values.tolist() if isinstance(values, Tensor) else list(values)
