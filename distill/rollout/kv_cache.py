"""Keys and values of a decode: preallocated, written in place, the prompt's part held once for all its rollouts.

A `DecodeCache` is handed to stock model code as its `past_key_values`. The model writes through `update`; the
attention function registered here reads the same object, which travels as a keyword argument of the model's forward.
With one rollout a prompt, prompt and completion lie in one buffer. With more, attention runs in two pieces (the
prompt's, one GEMM for all rows of the prompt, and the row's own) merged by their log-sum-exps; on CUDA as one kernel.
Left out on purpose: paging. All rows of a wave are as long as one another, so a dense buffer wastes nothing.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from distill.models import of_rows
from distill_kernels import decode_attention
from distill_kernels.decode_attention import LARGEST_HEAD
from distill_kernels.prefix_attention import with_sinks

# Not a name with "flash" in it: transformers would take it for FlashAttention.
ATTENTION_NAME = "distill_shared_prefix"

# Finite, so that a piece in which a row sees nothing gives weight 0 in the merge and never NaN.
MASKED = -1e30

# Whether `StaticDecodeCache` runs attention as one kernel where it can; benchmarks time both ways.
FUSED_ATTENTION = True


class PromptCache(NamedTuple):
    """What a prefill leaves: per layer [B, kv heads, P, D], and [B, P] bool, true where there is a token.

    `states` has a cache layer of transformers for each layer of a model in which some keep a state; those without
    attention have no heads in `keys`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    states: list[Any] = []  # noqa: RUF012 # never changed
    latent: bool = False  # whether the model caches latents, of which these are made (latents.py)

    def select(self, prompts: Tensor) -> "PromptCache":
        keys, values = [k[prompts] for k in self.keys], [v[prompts] for v in self.values]
        return PromptCache(keys, values, self.mask[prompts], of_rows(self.states, prompts), self.latent)


class DecodeCache(Cache):
    """Cache of R rows that continue prompts; `prompt_index` [R] is sorted, row r continues that prompt."""

    def __init__(self, prompt: PromptCache, prompt_index: Tensor, max_new_tokens: int) -> None:
        super().__init__(layers=of_rows(prompt.states, prompt_index))
        rows, prompts = prompt_index.numel(), prompt.mask.shape[0]
        self.shared = rows > prompts
        self.prompt_length = prompt.mask.shape[1]
        self.length = 0  # completion tokens whose keys are written
        self.windows: set[int] = set()  # the layers that have told attention of a window
        self._offset = 0 if self.shared else self.prompt_length
        self._prompt, self._prompt_index = prompt, prompt_index
        slots = self._offset + max_new_tokens - 1  # the last token's keys are never read

        def buffer(piece: Tensor) -> Tensor:
            made = piece.new_empty(rows, piece.shape[1], slots, piece.shape[3])
            if not self.shared:
                made[:, :, : self._offset] = piece[prompt_index]
            return made

        self._keys = [buffer(piece) for piece in prompt.keys]
        self._values = [buffer(piece) for piece in prompt.values]
        self._rows = rows
        self._arrange()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prompt_length + self.length

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Writes [R, kv heads, 1, D] at the current position; returns views of all that the rows' buffers hold.

        Latents go back as they are: `attend` writes what the model makes of them.
        """
        self.layer = layer_idx  # some layers share one attention module, which knows no number of its own
        return (key_states, value_states) if self._prompt.latent else self._write(key_states, value_states, layer_idx)

    def _write(self, key_states: Tensor, value_states: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        end = self._offset + self.length + 1
        keys, values = self._keys[layer][: self._rows], self._values[layer][: self._rows]
        keys[:, :, end - 1 : end] = key_states
        values[:, :, end - 1 : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def advance(self) -> None:
        """The token written by the last forward is now part of every row."""
        self.length += 1

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but those of the sorted index `rows`, moving them to the front of the buffers."""
        end = self._offset + self.length
        for buffer in (*self._keys, *self._values):
            buffer[: rows.numel(), :, :end] = buffer[rows, :, :end]
        self._rows, self.layers = rows.numel(), of_rows(self.layers, rows)
        prompts, self._prompt_index = self._prompt_index[rows].unique_consecutive(return_inverse=True)
        if prompts.numel() < self._prompt.mask.shape[0]:
            self._prompt = self._prompt.select(prompts)
        self._arrange()

    def _arrange(self) -> None:
        """Lays the rows out as [prompts, rows a prompt] for the shared piece, with holes where prompts differ."""
        mask, index = self._prompt.mask, self._prompt_index
        dtype = self._keys[0].dtype
        every_token_real = bool(mask.all())
        bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, MASKED)
        if not self.shared:
            bias = nn.functional.pad(bias[index], (0, self._keys[0].shape[2] - self.prompt_length))
            self.bias = None if every_token_real else bias[:, None, None]  # [R, 1, 1, slots]
            return
        counts = torch.bincount(index, minlength=mask.shape[0])
        self.width = int(counts.max())
        self.bias = None if every_token_real else bias[:, None, None]  # [B, 1, 1, P]
        self.slots = self.rows_of_slots = None
        if bool((counts != self.width).any()):
            first = counts.cumsum(0) - counts
            rank = torch.arange(index.numel(), device=index.device) - first[index]
            self.slots = index * self.width + rank  # [R]
            self.rows_of_slots = torch.zeros(counts.numel() * self.width, dtype=torch.long, device=index.device)
            self.rows_of_slots[self.slots] = torch.arange(index.numel(), device=index.device)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        layer: int,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One new token a row: [R, heads, 1, D] on what `update` returned, to [R, heads, Dv], Dv the values' size.

        A token sees itself and the `window` - 1 tokens before it; scores are capped to softcap * tanh(score / softcap);
        `sinks` [heads] are logits that take part in the softmax only.
        """
        if self._prompt.latent:
            keys, values = self._write(keys, values, layer)
            query = query.to(keys.dtype)
        rows, kv_heads = query.shape[0], keys.shape[1]
        query = query.view(rows, kv_heads, -1, query.shape[-1])  # [R, kv heads, group, D]
        first = 0
        if window is not None:
            self.windows.add(layer)
            # A window of w ends at the new token, which stands at prompt_length + length.
            first = max(0, self.prompt_length + self.length + 1 - window)
        own = max(0, first - self.prompt_length) if self.shared else first
        bias = self._own_bias(own, keys.shape[2])
        output, lse = attention_with_lse(query, keys[:, :, own:], values[:, :, own:], bias, scale, softcap)
        if sinks is not None:
            output, lse = with_sinks(output, lse, sinks.view(lse.shape[1:]))
        if self.shared and first < self.prompt_length:
            output = merge_pieces(output, lse, *self._attend_prompt(query, layer, scale, softcap, first))
        return output.flatten(1, 2)

    def _own_bias(self, first: int, end: int) -> Tensor | None:
        """What is added to the scores of the rows' own slots from `first` to `end`, [R or 1, 1, 1, end - first]."""
        return None if self.shared or self.bias is None else self.bias[..., first:end]

    def _attend_prompt(
        self, query: Tensor, layer: int, scale: float, softcap: float | None, first: int
    ) -> tuple[Tensor, Tensor]:
        """The prompt's piece for every row: [R, kv heads, group, D] to the same of Dv, and log-sum-exps without it."""
        _, kv_heads, group, width = query.shape
        if self.slots is not None:
            query = query[self.rows_of_slots]
        keys, values = self._prompt.keys[layer][:, :, first:], self._prompt.values[layer][:, :, first:]
        prompts = keys.shape[0]
        query = query.view(prompts, self.width, kv_heads, group, width).transpose(1, 2)
        bias = None if self.bias is None else self.bias[..., first:]
        query = query.reshape(prompts, kv_heads, -1, width)
        output, lse = attention_with_lse(query, keys, values, bias, scale, softcap)
        output = output.view(prompts, kv_heads, self.width, group, -1).transpose(1, 2).flatten(0, 1)
        lse = lse.view(prompts, kv_heads, self.width, group).transpose(1, 2).flatten(0, 1)
        return (output, lse) if self.slots is None else (output[self.slots], lse[self.slots])


class StaticDecodeCache(DecodeCache):
    """The same addresses and shapes in every step, for CUDA graphs: the position is a tensor, not a number.

    Where attention is `fused` into one kernel, it reads up to the position and skips rows that have `ended` ([R] bool,
    if set). Elsewhere `show` says how many completion slots it reads; slots past the position are masked. Windows, soft
    caps and sinks are not for this cache.
    """

    ended: Tensor | None = None

    def __init__(self, prompt: PromptCache, prompt_index: Tensor, max_new_tokens: int) -> None:
        super().__init__(prompt, prompt_index, max_new_tokens)
        for buffer in (*self._keys, *self._values):
            buffer[:, :, self._offset :].zero_()  # masked slots are multiplied by 0, which a NaN would survive
        self._end = self._keys[0].shape[2]

    @cached_property
    def fused(self) -> bool:
        """On CUDA, for heads of up to LARGEST_HEAD, as wide for values as for keys."""
        widths = ((k.shape[-1], v.shape[-1]) for k, v in zip(self._keys, self._values, strict=True))
        heads_fit = all(key == value <= LARGEST_HEAD for key, value in widths)
        return FUSED_ATTENTION and self._prompt_index.device.type == "cuda" and heads_fit

    def show(self, completion_slots: int) -> None:
        """Makes attention read this many completion slots; fewer than have been written would be wrong."""
        self._end = min(self._offset + completion_slots, self._keys[0].shape[2])

    def _write(self, key_states: Tensor, value_states: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self._keys[layer][: self._rows], self._values[layer][: self._rows]
        keys.index_copy_(2, self._slot, key_states.to(keys.dtype))
        values.index_copy_(2, self._slot, value_states.to(values.dtype))
        return keys[:, :, : self._end], values[:, :, : self._end]

    def advance(self) -> None:
        """Only tensors change, so that a replayed graph does the same; the caller keeps `length` up to date."""
        self._slot += 1
        if self.fused:
            return
        # Past the last slot nothing is written or read any more.
        self._bias.index_fill_(-1, self._slot.clamp(max=self._bias.shape[-1] - 1), 0.0)

    def _arrange(self) -> None:
        super()._arrange()
        device, written = self._prompt_index.device, self._offset + self.length
        self._slot = torch.tensor([written], device=device)
        padding = (~self._prompt.mask).sum(-1)  # [B]
        self._of_prompts = {"left_padding": padding if self.shared else padding[self._prompt_index]}
        if self.shared:
            rows = torch.bincount(self._prompt_index, minlength=padding.numel())
            self._of_prompts |= {"row_start": nn.functional.pad(rows.cumsum(0), (1, 0)), "rows_a_prompt": self.width}
        future = torch.arange(self._keys[0].shape[2], device=device) > written
        bias = torch.zeros(1, 1, 1, future.numel(), dtype=self._keys[0].dtype, device=device)
        if not self.shared and self.bias is not None:
            bias = self.bias.clone()
        self._bias = bias.masked_fill_(future, MASKED)

    def _own_bias(self, first: int, end: int) -> Tensor | None:
        return self._bias[..., first:end]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layer: int, scale: float, **options: Any) -> Tensor:
        # A window moves with the position, which is no number here; the kernel has neither soft caps nor sinks.
        if beyond := [name for name, given in options.items() if given is not None]:
            raise NotImplementedError(f"{beyond[0]} in steps of fixed shape")
        if not self.fused:
            return super().attend(query, keys, values, layer, scale)
        of_prompts = self._of_prompts
        if self.shared:
            prompt_keys, prompt_values = self._prompt.keys[layer], self._prompt.values[layer]
            of_prompts = of_prompts | {"prompt_keys": prompt_keys, "prompt_values": prompt_values}
        query = query.squeeze(2)
        return decode_attention(query, keys, values, self._slot, scale=scale, ended=self.ended, **of_prompts)


def merge_pieces(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Attention over two sets of keys from that over each, in float32 or better: weighted by their log-sum-exps."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    return torch.lerp(other.to(dtype), output.to(dtype), torch.sigmoid(lse - other_lse).unsqueeze(-1).to(dtype))


def attention_with_lse(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention without a causal mask: [b, h, q, D] on [b, h, k, D], to [b, h, q, D] and float32 [b, h, q] (nats)."""
    # For one query a row, two products are faster than copying values into keys' size: 2.5 ms for 4.8 ms on a CPU.
    if query.device.type == "cpu" and softcap is None and keys.shape[-1] == values.shape[-1]:
        bias = None if bias is None else bias.expand(*query.shape[:3], keys.shape[2])
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, keys, values, 0.0, False, attn_mask=bias, scale=scale)
    return composed_attention(query, keys, values, bias, scale, softcap)


def composed_attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` of two products, to float32; in between only the weights of the values are rounded."""
    scores = _float32_product(query, keys.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores += bias
    lse = scores.logsumexp(-1, keepdim=True)
    return _float32_product((scores - lse).exp_().to(values.dtype), values), lse.squeeze(-1)


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """[b, h, m, k] and [b, h, k, n] on a GPU to float32 [b, h, m, n], which half precision would round."""
    if a.dtype == torch.float32:
        return torch.matmul(a, b)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])


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
    output = decode_cache.attend(query.to(key.dtype), key, value, decode_cache.layer, scale, **options)
    return output.to(query.dtype).unsqueeze(1), None


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
