"""Keys and values of a decode: at fixed addresses, written in place, a prompt's held once for all its rollouts.

A `DecodeCache` is handed to stock model code as its `past_key_values`. What the model gives to `update` comes back as
it is, and goes with the query to the attention function registered here, which writes it: the same object travels as a
keyword argument of the model's forward.
What a step does follows tensors alone (`position`, `row_start`, `left_padding`, `ended`), so that it can be captured
once and repeated for other rows and prompts: buffers are as large as the largest batch, and a batch fills some of them.
Left out on purpose: paging. All rows of a wave are as long as one another, so a dense buffer wastes nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from distill.models import of_rows
from distill_kernels import decode_attention

# Not a name with "flash" in it: transformers would take it for FlashAttention.
ATTENTION_NAME = "distill_shared_prefix"


class PromptCache(NamedTuple):
    """What a prefill leaves: per layer [B, kv heads, P, D], and [B, P] bool, true where there is a token.

    `states` has a cache layer of transformers for each layer of a model in which some keep a state; those without
    attention have no heads in `keys`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    states: list[Any] = []  # noqa: RUF012 # never changed


class Room(NamedTuple):
    """What buffers have room for."""

    prompts: int
    prompt_tokens: int
    rows: int
    tokens: int
    """Of a completion."""

    def grown(self, other: "Room") -> "Room":
        """Room for either."""
        return Room(*map(max, self, other))

    @property
    def positions(self) -> int:
        """That keys and values are kept of."""
        return self.prompts * self.prompt_tokens + self.rows * self.tokens


class DecodeCache(Cache):
    """Cache of rows that continue prompts; `load` says which."""

    def __init__(self, like: PromptCache, room: Room) -> None:
        """`like` shows the layers' heads, their dtype and device."""
        super().__init__(layers=[])
        device = like.mask.device

        def buffers(pieces: list[Tensor], first: int, tokens: int) -> list[Tensor]:
            return [piece.new_empty(first, piece.shape[1], tokens, piece.shape[3]) for piece in pieces]

        self._prompt_keys = buffers(like.keys, room.prompts, room.prompt_tokens)
        self._prompt_values = buffers(like.values, room.prompts, room.prompt_tokens)
        self._keys = buffers(like.keys, room.rows, room.tokens)
        self._values = buffers(like.values, room.rows, room.tokens)
        self._left_padding, self._row_start = (
            torch.zeros(count, dtype=torch.long, device=device) for count in (room.prompts, room.prompts + 1)
        )
        self.prompt_index = torch.zeros(room.rows, dtype=torch.long, device=device)  # sorted
        self.ended = torch.zeros(room.rows, dtype=torch.bool, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        """Completion tokens whose keys are written, which `length` repeats as a number."""
        self.windows: set[int] = set()
        """The layers that have told attention of a window."""
        self.room, self.length, self.prompt_length, self.rows, self.rows_a_prompt = room, 0, 0, 0, 0

    def load(self, prompt: PromptCache, prompt_index: Tensor, rows_a_prompt: int | None = None) -> None:
        """Begins anew: row r continues the prompt `prompt_index[r]` ([R], sorted), which so many do at the most."""
        B, P = prompt.mask.shape
        first = self.room.prompt_tokens - P
        for buffers, pieces in ((self._prompt_keys, prompt.keys), (self._prompt_values, prompt.values)):
            for buffer, piece in zip(buffers, pieces, strict=True):
                buffer[:B, :, first:] = piece
        self._left_padding[:B] = self.room.prompt_tokens - prompt.mask.sum(1)
        self.layers = of_rows(prompt.states, prompt_index)
        self.length, self.prompt_length, self.rows = 0, P, prompt_index.numel()
        self.rows_a_prompt = rows_a_prompt or self.rows
        self.position.zero_()
        self.ended.zero_()
        self._place(prompt_index)

    def _place(self, prompt_index: Tensor) -> None:
        self.prompt_index[: self.rows] = prompt_index
        prompts = torch.arange(len(self._row_start), device=prompt_index.device)
        self._row_start.copy_(torch.searchsorted(prompt_index, prompts))

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but those of the sorted index `rows`, moving them to the front of the buffers."""
        self.rows = rows.numel()
        for buffer in (*self._keys, *self._values):
            buffer[: self.rows, :, : self.length] = buffer[rows, :, : self.length]
        self.layers = of_rows(self.layers, rows)
        self.ended[: self.rows] = self.ended[rows]
        self._place(self.prompt_index[rows])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prompt_length + self.length

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Returns what it is given: `attend` writes it, or what the model makes of it if these are latents."""
        self.layer = layer_idx  # some layers share one attention module, which knows no number of its own
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, **options: Any) -> Tensor:
        """One new token a row: [R, heads, 1, D] to [R, heads, Dv], Dv the values' size.

        Its key and value, [R, kv heads, 1, D] and [.., Dv], are written at `position` first. `options` are those of
        `distill_kernels.decode_attention`.
        """
        keys, values = self._keys[layer][: self.rows], self._values[layer][: self.rows]
        if options.get("window") is not None:
            self.windows.add(layer)
        return decode_attention(
            query.squeeze(2).to(keys.dtype),
            keys,
            values,
            self.position,
            scale=scale,
            new_keys=key.squeeze(2).to(keys.dtype),
            new_values=value.squeeze(2).to(values.dtype),
            prompt_keys=self._prompt_keys[layer],
            prompt_values=self._prompt_values[layer],
            row_start=self._row_start,
            rows_a_prompt=self.rows_a_prompt,
            left_padding=self._left_padding,
            ended=self.ended[: self.rows],
            **options,
        )


@torch.compiler.disable
def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    decode_cache: DecodeCache | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in a decode step; see `DecodeCache.attend`."""
    if decode_cache is None or kwargs.get("position_bias") is not None:
        found = "a model that passes no arguments on to attention" if decode_cache is None else "a position bias"
        raise NotImplementedError(f"{found} is beyond it")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"window": sliding_window or None, "softcap": softcap, "sinks": s_aux}
    output = decode_cache.attend(query, key, value, decode_cache.layer, scale, **options)
    return output.to(query.dtype).unsqueeze(1), None


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
