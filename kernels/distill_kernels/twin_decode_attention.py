"""Attention of a decode step in PyTorch: what `triton_decode_attention` does for CUDA, for tensors on a CPU.

A loop over prompts, each with one product for all of its rows. Rows without prompts are one group.
"""

import itertools
import math

import torch
from torch import Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    prompt_keys: Tensor | None,
    prompt_values: Tensor | None,
    row_start: Tensor | None,
    rows_a_prompt: int,
    left_padding: Tensor | None,
    ended: Tensor | None,
    scale: float,
) -> None:
    """Writes out [R, Hq, D]; see `decode_attention`."""
    (R, Hq, D), (_, Hkv, T, _) = query.shape, keys.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    seen = min(int(position) + 1, T)
    query = query.to(dtype).reshape(R, Hkv, Hq // Hkv, D) * scale  # [R, Hkv, g, D]
    bounds = [0, R] if row_start is None else row_start.tolist()
    for prompt, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        of_rows, own_values = query[begin:end], values[begin:end, :, :seen].to(dtype)
        scores = of_rows @ keys[begin:end, :, :seen].to(dtype).mT  # [rows, Hkv, g, seen]
        shared = 0
        if prompt_keys is not None:
            first = 0 if left_padding is None else int(left_padding[prompt])
            shared = prompt_keys.shape[2] - first
            grouped = of_rows.transpose(0, 1).flatten(1, 2)  # [Hkv, rows * g, D]
            of_prompt = (grouped @ prompt_keys[prompt, :, first:].to(dtype).mT).view(Hkv, end - begin, -1, shared)
            scores = torch.cat([of_prompt.transpose(0, 1), scores], -1)
        elif left_padding is not None:
            padding = torch.arange(seen) < left_padding[:, None]
            scores = scores.masked_fill(padding[:, None, None], -math.inf)
            own_values = own_values.masked_fill(padding[:, None, :, None], 0)
        weights = scores.softmax(-1)
        result = weights[..., shared:] @ own_values
        if shared:
            grouped = weights[..., :shared].transpose(0, 1).flatten(1, 2)
            of_prompt = grouped @ prompt_values[prompt, :, first:].to(dtype)
            result += of_prompt.view(Hkv, end - begin, -1, D).transpose(0, 1)
        out[begin:end] = result.flatten(1, 2)
    if ended is not None:
        out.masked_fill_(ended[:, None, None], 0)
