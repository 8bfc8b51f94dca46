"""How many rows are sampled at once: waves of rows, of blocks of prompts prefilled together, within a budget."""

from collections.abc import Iterator
from typing import Any


def wave_bytes(
    config: Any,
    itemsize: int,
    token_bytes: int,
    *,
    state_bytes: int = 0,
    prompt_length: int,
    num_rollouts: int,
    max_new_tokens: int,
) -> tuple[int, int]:
    """Bytes that sampling takes beside the weights, for each prompt and for each of its rows.

    `config` is the text model's; `token_bytes` are those of one token's keys and values, `itemsize` of a weight,
    `state_bytes` what layers keep of a row whatever its length.
    """
    width = 8 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    a_prompt = state_bytes + prompt_length * (token_bytes + width * itemsize + 4 * prompt_length)
    # Three float32 of logits: the head's, the sampler's and the next step's.
    a_row = state_bytes + max_new_tokens * token_bytes + 12 * config.vocab_size + width * itemsize
    if num_rollouts == 1:  # the prompt's keys are copied into the row's buffer
        a_row += prompt_length * token_bytes
    return a_prompt, a_row


def cut_waves(
    prompts: int, num_rollouts: int, budget: int, a_prompt: int, a_row: int, limit: int | None = None
) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of prompts that are prefilled together, each with the row ranges that are decoded together.

    At most `budget` bytes (see `wave_bytes`) and `limit` rows at once, but never less than one row.
    """
    limit = limit or prompts * num_rollouts
    block = min(prompts, budget // (a_prompt + num_rollouts * a_row), limit // num_rollouts)
    if block > 0:
        for start, stop in even_parts(prompts, block):
            yield slice(start, stop), [slice(start * num_rollouts, stop * num_rollouts)]
        return
    at_once = max(1, min(limit, (budget - a_prompt) // a_row))
    for prompt in range(prompts):
        first = prompt * num_rollouts
        parts = even_parts(num_rollouts, at_once)
        yield slice(prompt, prompt + 1), [slice(first + start, first + stop) for start, stop in parts]


def even_parts(total: int, largest: int) -> list[tuple[int, int]]:
    """Cuts range(total) into the fewest parts of at most `largest`, as even as they come."""
    count = -(-total // largest)
    return [(total * part // count, total * (part + 1) // count) for part in range(count)]
