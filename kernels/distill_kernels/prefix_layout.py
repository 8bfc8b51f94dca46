"""How packed tokens lie, planned on the host from lengths alone, for `prefix_attention`.

Left out on purpose: how index tensors come to a device without making the host wait, which the caller knows.
"""

import itertools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Segments of one dense call: none is padded by more than this share of the longest.
BUCKET_SPREAD = 0.25

# A flash backward has a program for this many keys of a prompt and a head (for half as many where heads are larger than
# 128), which goes over all of the prompt's queries.
PROGRAM_KEYS = 128
PROGRAMS = 132  # one for every multiprocessor of an H100
SHORTEST_PIECE = 512  # queries, for which one more copy of the keys is little


class Shared(NamedTuple):
    """Where one prompt's keys and the queries of all its completions lie among the packed tokens."""

    key_start: int
    key_length: int
    query_start: int
    query_length: int


class Prefix(NamedTuple):
    """The keys of one prompt and the queries that see any of them: a slice where that is all of its completions'.

    `seen` [queries, keys] bool is true where a query sees a key, or None where each sees them all.
    """

    keys: slice
    queries: slice | Tensor
    seen: Tensor | None = None


class Cut(NamedTuple):
    """Prompts whose queries a backward takes in several `pieces` a prompt, each with a copy of the prompt's keys."""

    pieces: list[int]
    keys: Tensor  # [copied keys] int64, where each lies among the packed tokens; a prompt's copies in a row
    lengths: tuple[Tensor, Tensor, int, int]  # cumulative of queries and of keys, int32, and the longest of both


class Bucket(NamedTuple):
    """`count` segments computed in one dense call of `width` tokens each.

    Equal segments that lie side by side are a view from `start` on; others are gathered by `read` [count * width]
    and scattered by `write`, which sends padding to the row past the last token.
    """

    count: int
    width: int
    start: int
    read: Tensor | None = None
    write: Tensor | None = None

    def take(self, packed: Tensor, index: Tensor | None) -> Tensor:
        """[L + 1, h, ..] to [count, h, width, ..]."""
        if index is None:
            rows = packed[self.start : self.start + self.count * self.width]
        else:
            rows = packed.index_select(0, index)
        return rows.unflatten(0, (self.count, self.width)).transpose(1, 2)

    def put(self, packed: Tensor, values: Tensor) -> None:
        """The reverse of `take`."""
        rows = values.transpose(1, 2).flatten(0, 1)
        if self.write is None:
            packed[self.start : self.start + len(rows)] = rows
        else:
            packed.index_copy_(0, self.write, rows)


@dataclass
class PrefixLayout:
    """Lengths of the causal segments in packed order, and which of them share a prompt's keys."""

    segments: list[int]
    shared: list[Shared]
    to_device: Callable[[Tensor], Tensor]  # brings index tensors from the host to where the tokens are
    calls: int = 0  # of attention's forward with this layout
    windowed_calls: int = 0  # those of them through a window
    _prefixes: dict[int | None, list[Prefix]] = field(default_factory=dict)
    _cuts: dict[int, Cut | None] = field(default_factory=dict)

    def handle(self) -> Tensor:
        """What stands for the layout among the tensors of an op: [1] int64 on the host.

        Its memory keeps the layout alive: whatever saves the handle for a backward has saved the layout, too. The
        layout must not hold it in turn.
        """
        number = next(_numbers)
        memory = _Memory(number.to_bytes(8, sys.byteorder))
        memory.layout = _living[number] = self
        return torch.frombuffer(memory, dtype=torch.int64)

    @cached_property
    def starts(self) -> list[int]:
        """Where each segment begins."""
        starts, at = [], 0
        for length in self.segments:
            starts.append(at)
            at += length
        return starts

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Segments in dense groups of similar width, for backends without variable lengths."""
        groups: list[list[int]] = []
        for segment in sorted(range(len(self.segments)), key=lambda i: (-self.segments[i], i)):
            if groups and self.segments[segment] >= (1 - BUCKET_SPREAD) * self.segments[groups[-1][0]]:
                groups[-1].append(segment)
            else:
                groups.append([segment])
        return [self._bucket(group) for group in groups]

    def _bucket(self, group: list[int]) -> Bucket:
        width, first, spare = self.segments[group[0]], self.starts[group[0]], sum(self.segments)
        begin = torch.tensor([self.starts[i] for i in group])
        length = torch.tensor([self.segments[i] for i in group])
        if bool((length == width).all() and (begin == first + width * torch.arange(len(group))).all()):
            return Bucket(len(group), width, first)
        column = torch.arange(width)
        read = begin[:, None] + torch.minimum(column, length[:, None] - 1)
        write = torch.where(column < length[:, None], read, spare)
        return Bucket(len(group), width, first, *(self.to_device(each.flatten()) for each in (read, write)))

    def prefixes(self, window: int | None) -> list[Prefix]:
        """What completions see of their prompts, through a window of so many tokens; planned once a window."""
        if window not in self._prefixes:
            self._prefixes[window] = [made for each in self.shared if (made := self._prefix(each, window)) is not None]
        return self._prefixes[window]

    def _prefix(self, shared: Shared, window: int | None) -> Prefix | None:
        """None where nothing is seen, as through a window of one token."""
        keys, queries = (slice(start, start + length) for start, length in (shared[:2], shared[2:]))
        if window is None:
            return Prefix(keys, queries)
        spans = [(b, n) for b, n in zip(self.starts, self.segments, strict=True) if queries.start <= b < queries.stop]
        if shared.key_length + max(n for _, n in spans) <= window:
            return Prefix(keys, queries)
        # A completion's token j sees the last window - 1 - j keys.
        count = min(shared.key_length, window - 1)
        if count == 0:
            return None
        token = torch.cat([torch.arange(min(n, window - 1)) for _, n in spans])
        seen = torch.arange(count) > token[:, None] + count - window
        if len(token) < shared.query_length:
            queries = self.to_device(torch.cat([torch.arange(b, b + min(n, window - 1)) for b, n in spans]))
        return Prefix(slice(keys.stop - count, keys.stop), queries, self.to_device(seen))

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Cumulative lengths, int32: of the segments, of the sharing queries, of the shared keys."""
        lengths = (self.segments, [s.query_length for s in self.shared], [s.key_length for s in self.shared])
        return tuple(self._ends(each) for each in lengths)

    def _ends(self, lengths: list[int]) -> Tensor:
        return self.to_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))

    def cut(self, heads: int) -> Cut | None:
        """How prompts are cut up for a backward of so many query heads, None if not at all; planned once a number."""
        if heads not in self._cuts:
            pieces = pieces_of(self.shared, heads)
            self._cuts[heads] = self._cut(pieces) if max(pieces, default=1) > 1 else None
        return self._cuts[heads]

    def _cut(self, pieces: list[int]) -> Cut:
        keys, query_lengths, key_lengths = [], [], []
        for prompt, count in zip(self.shared, pieces, strict=True):
            keys.append(torch.arange(prompt.key_start, prompt.key_start + prompt.key_length).repeat(count))
            ends = [prompt.query_length * i // count for i in range(count + 1)]
            query_lengths += [end - begin for begin, end in itertools.pairwise(ends)]
            key_lengths += [prompt.key_length] * count
        ends = self._ends(query_lengths), self._ends(key_lengths)
        return Cut(pieces, self.to_device(torch.cat(keys)), (*ends, max(query_lengths), max(key_lengths)))


class _Memory(bytearray):
    """A handle's."""

    layout: PrefixLayout


_numbers = itertools.count()
_living: weakref.WeakValueDictionary[int, PrefixLayout] = weakref.WeakValueDictionary()


def layout_of(handle: Tensor) -> PrefixLayout:
    """The layout that a handle stands for."""
    return _living[handle.item()]


def pieces_of(shared: list[Shared], heads: int) -> list[int]:
    """Into how many pieces each prompt's queries are cut, so that few prompts keep a large card busy, too."""
    programs = max(1, heads * sum(-(-prompt.key_length // PROGRAM_KEYS) for prompt in shared))
    # So many that they all run at once, or in two turns; with two pieces most multiprocessors would run both.
    wanted = next((count for turns in (1, 2) if (count := turns * PROGRAMS // programs) > 2), 1)
    return [min(wanted, max(1, prompt.query_length // SHORTEST_PIECE)) for prompt in shared]
