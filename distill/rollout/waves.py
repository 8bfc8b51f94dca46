"""How many rows are sampled at once: waves of rows, of blocks of prompts prefilled together, within a budget."""

from collections.abc import Iterator
from typing import Any, NamedTuple

# Columns of a block of prompts that run at once at the least, where memory is short: fewer would take much longer.
FEWEST_COLUMNS = 64


class WaveBytes(NamedTuple):
    """Bytes that sampling takes beside the weights."""

    prompt: int
    """Of a prompt's keys, values and states, as they are made and in the buffers."""
    column: int
    """Of each column of a prompt that runs at once with others."""
    row: int
    columns: int
    """A prompt's."""

    @property
    def whole(self) -> int:
        """Of a prompt, all of its columns at once."""
        return self.prompt + self.columns * self.column

    @property
    def least(self) -> int:
        """Of a prompt, at the least."""
        return self.prompt + min(self.columns, FEWEST_COLUMNS) * self.column

    def columns_within(self, budget: int, prompts: int, rows: int) -> int:
        """How many columns of some prompts may run at once, beside the buffers of their rows."""
        left = (budget - rows * self.row) // prompts - self.prompt
        return min(self.columns, max(FEWEST_COLUMNS, left // self.column))


def wave_bytes(
    config: Any,
    itemsize: int,
    token_bytes: int,
    *,
    state_bytes: int = 0,
    prompt_length: int,
    max_new_tokens: int,
) -> WaveBytes:
    """`config` is the text model's; `token_bytes` are those of one token's keys and values, `itemsize` of a weight,
    `state_bytes` what layers keep of a row whatever its length.
    """
    width = 8 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return WaveBytes(
        prompt=state_bytes + 2 * prompt_length * token_bytes,
        column=width * itemsize + 4 * prompt_length,
        # Three float32 of logits: the head's, the sampler's and the next step's.
        row=state_bytes + max_new_tokens * token_bytes + 12 * config.vocab_size + width * itemsize,
        columns=prompt_length,
    )


def cut_waves(
    prompts: int, num_rollouts: int, budget: int, needed: WaveBytes, limit: int | None = None
) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of prompts that are prefilled together, each with the row ranges that are decoded together.

    At most `budget` bytes and `limit` rows at once, but never less than one row.
    """
    limit = limit or prompts * num_rollouts
    a_prompt, a_row = needed.least, needed.row
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
