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

# A backward has a program for a block of keys, which goes over the queries that see them: those of all completions of a
# prompt, where other keys have those of one segment. They are cut into parts of about so many queries, but no more than
# fill a large card, as each takes float32 of its own.
QUERIES_A_PART = 1024
PROGRAMS = 4 * 132  # four for every multiprocessor of an H100


class Shared(NamedTuple):
    """Where one prompt's keys and the queries of all its completions lie among the packed tokens."""

    key_start: int
    key_length: int
    query_start: int
    query_length: int

    def pieces(self, programs: int) -> list[tuple[int, int]]:
        """First query and number of queries of the parts that a backward takes, which has `programs` for each."""
        count = min(-(-self.query_length // QUERIES_A_PART), max(1, -(-PROGRAMS // programs)))
        ends = [self.query_start + self.query_length * i // count for i in range(count + 1)]
        return [(begin, end - begin) for begin, end in itertools.pairwise(ends)]


class Prefix(NamedTuple):
    """The keys of one prompt and the queries that see any of them: a slice where that is all of its completions'.

    `seen` [queries, keys] bool is true where a query sees a key, or None where each sees them all.
    """

    keys: slice
    queries: slice | Tensor
    seen: Tensor | None = None


class KeyJobs(NamedTuple):
    """What the kernel does that gives gradients to keys, a line of int32 a program."""

    jobs: Tensor
    """[n, 5]: first key, keys, first query, queries, and where its part is written, -1 for the gradient itself."""
    sums: Tensor
    """[m, 5]: first key, keys, their first part, rows from one part to the next, and number of parts."""
    places: Tensor | None
    """[L] a token's position in its row, for a window."""
    part_rows: int


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
    _tiles: dict[int, Tensor] = field(default_factory=dict)
    _jobs: dict[tuple, KeyJobs] = field(default_factory=dict)

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
    def prompts(self) -> list[Shared | None]:
        """The prompt of each segment that shares one."""
        found, at = [], 0
        for start in self.starts:
            while at < len(self.shared) and start >= self.shared[at].query_start + self.shared[at].query_length:
                at += 1
            inside = at < len(self.shared) and start >= self.shared[at].query_start
            found.append(self.shared[at] if inside else None)
        return found

    def tiles(self, size: int) -> Tensor:
        """[n, 5] int32, a line for `size` queries of a segment or the rest of them: the segment's first token, its
        length, the first query in it, its prompt's first token and length. Those that see most come first."""
        if size not in self._tiles:
            lines = []
            for start, length, prompt in zip(self.starts, self.segments, self.prompts, strict=True):
                seen = (prompt.key_start, prompt.key_length) if prompt else (0, 0)
                lines += [(start, length, first, *seen) for first in range(0, length, size)]
            lines.sort(key=lambda line: -line[2] - line[4])
            self._tiles[size] = self.to_device(torch.tensor(lines, dtype=torch.int32).reshape(-1, 5))
        return self._tiles[size]

    def jobs(self, size: int, kv_heads: int, window: int | None) -> KeyJobs:
        """For `size` keys of a segment at once, of so many heads; planned once a window."""
        if (size, kv_heads, window) not in self._jobs:
            self._jobs[size, kv_heads, window] = self._key_jobs(size, kv_heads, window)
        return self._jobs[size, kv_heads, window]

    def _key_jobs(self, size: int, kv_heads: int, window: int | None) -> KeyJobs:
        jobs, sums, rows = [], [], 0
        shared = {prompt.key_start: prompt for prompt in self.shared}
        for start, length in zip(self.starts, self.segments, strict=True):
            prompt, blocks = shared.get(start), range(0, length, size)
            pieces = [] if prompt is None else prompt.pieces(len(blocks) * kv_heads)
            for first in blocks:
                count = min(size, length - first)
                jobs.append((start + first, count, start + first, length - first, rows + first if prompt else -1))
                # Completions begin where the prompt ends, and see its last window - 1 tokens.
                seen = window is None or length - (first + count - 1) < window
                for i, (query, queries) in enumerate(pieces if seen else ()):
                    jobs.append((start + first, count, query, queries, rows + (i + 1) * length + first))
                if prompt:
                    sums.append((start + first, count, rows + first, length, 1 + len(pieces) * seen))
            rows += length * (1 + len(pieces)) if prompt else 0
        jobs.sort(key=lambda job: -job[3])
        tables = (torch.tensor(lines, dtype=torch.int32).reshape(-1, 5) for lines in (jobs, sums))
        return KeyJobs(*map(self.to_device, tables), None if window is None else self.places, rows)

    @cached_property
    def places(self) -> Tensor:
        """[L] int32, each token's position in its row: a completion's go on from its prompt's."""
        first = [prompt.key_length if prompt else 0 for prompt in self.prompts]
        rows = [torch.arange(at, at + n, dtype=torch.int32) for at, n in zip(first, self.segments, strict=True)]
        return self.to_device(torch.cat(rows))


class _Memory(bytearray):
    """A handle's."""

    layout: PrefixLayout


_numbers = itertools.count()
_living: weakref.WeakValueDictionary[int, PrefixLayout] = weakref.WeakValueDictionary()


def layout_of(handle: Tensor) -> PrefixLayout:
    """The layout that a handle stands for."""
    return _living[handle.item()]
