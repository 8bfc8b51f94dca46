"""Completions that go on from their prompt's states, for models in which some layers keep states instead of keys.

A prompt is run once, with gradients, and leaves a cache; each of its completions gets a copy by index, whose gradients
autograd adds up. Attention beside the states reads the prompt's keys, repeated for each row, in front of a row's own.
Left out on purpose: anything of our own about attention or states; the model computes both, and a probe (models' wing)
tells whether it lets gradients through.
"""

import contextlib
import functools
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import Cache

from distill.forward.packing import Rows, length_buckets
from distill.models import cache_argument, checkpointed, empty_cache, of_rows
from distill.runtime import to_device


def continued_hidden(
    body: nn.Module, prompt_ids: Tensor, completion_ids: Tensor, rows: Rows, *, checkpointing: bool = False
) -> Tensor:
    """`completion_hidden` in a call for the prompts of each length, and one for their completions of like length."""
    run = functools.partial(_run, body, checkpointing)
    index = functools.partial(_index, device=prompt_ids.device)
    ends = list(accumulate(rows.completion_lengths))
    order, found, filled = torch.empty(ends[-1], dtype=torch.int64), [], 0
    for p in sorted({rows.prompt_lengths[prompt] for prompt in rows.prompt_index}):
        prompts = sorted({prompt for prompt in rows.prompt_index if rows.prompt_lengths[prompt] == p})
        members = [row for row, prompt in enumerate(rows.prompt_index) if prompt in prompts]
        place = [prompts.index(rows.prompt_index[row]) for row in members]
        cache = empty_cache(body.config, graph=True)
        found.append(run(prompt_ids[index(prompts), -p:], 0, cache)[:, -1])
        for row, at in zip(members, place, strict=True):
            order[ends[row] - rows.completion_lengths[row] : ends[row]] = filled + at  # the first of them stays
        filled += len(prompts)
        fed = [(row, at) for row, at in zip(members, place, strict=True) if rows.fed(row)]
        for bucket in length_buckets(Rows([0], [rows.completion_lengths[row] for row, _ in fed], [0] * len(fed))):
            batch, of = zip(*(fed[i] for i in bucket), strict=True)
            width = max(2, rows.fed(batch[0]))  # a single token takes other, in-place paths through a model
            own = Cache(layers=of_rows(cache.layers, index(of)))
            found.append(run(completion_ids[index(batch), :width], p, own).flatten(0, 1))
            for i, row in enumerate(batch):
                order[ends[row] - rows.fed(row) : ends[row]] = filled + i * width + torch.arange(rows.fed(row))
            filled += len(batch) * width
    return torch.cat(found)[to_device(order, prompt_ids.device)]


def _index(numbers: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(numbers), device)


def _run(body: nn.Module, checkpointing: bool, token_ids: Tensor, position: int, cache: Cache) -> Tensor:
    """Hidden states of token ids [n, w] that stand at `position` and after; `cache` is filled with them."""
    positions = torch.arange(position, position + token_ids.shape[1], device=token_ids.device)
    arguments = {"input_ids": token_ids, "position_ids": positions.expand(token_ids.shape)}
    arguments |= {"use_cache": not checkpointing} | cache_argument(body, cache)  # a given cache is filled in any case
    with checkpointed(body) if checkpointing else contextlib.nullcontext():
        return body(**arguments).last_hidden_state
