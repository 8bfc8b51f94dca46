"""A step that is recorded once and repeated: the same as running it, for whatever lies in the tensors it reads."""

import pytest
import torch
from torch import Tensor, nn

from distill_kernels import decode_attention, recording, sample

CPU = torch.device("cpu")


class Buffers:
    """What steps of the tests read and leave behind, with another content for each seed."""

    def __init__(self) -> None:
        self.x, self.out, self.ids = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)
        self.kept, self.position = torch.zeros(4, 9), torch.zeros(1, dtype=torch.long)
        self.cache = torch.zeros(4, 9, 6)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(torch.eye(6))

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x.copy_(torch.randn(4, 6, generator=generator))
        self.ids.copy_(torch.randint(6, (4,), generator=generator))


def elementwise(b: Buffers, weight: Tensor) -> None:
    halves = b.x.view(4, 2, 3)
    turned = torch.cat([-halves[:, 1], halves[:, 0]], -1)
    b.out.copy_(nn.functional.silu(turned) * b.x + b.x.mean(-1, keepdim=True).rsqrt().nan_to_num())


def products(b: Buffers, weight: Tensor) -> None:
    b.out.copy_(nn.functional.linear(b.x, weight).softmax(-1) @ weight)


def packed(b: Buffers, weight: Tensor) -> None:
    """An operation that has no form to write into what is there, seen through few tensors, and through many."""
    made = torch.ops.mkldnn._linear_pointwise(
        b.x, torch.ops.mkldnn._reorder_linear_weight(weight), None, "none", [], ""
    )
    b.out.copy_(made[:, :3].repeat(1, 2) * made)
    for column in range(6):
        b.out[:, column] += made[:, column : column + 1].sum(-1)


def factories(b: Buffers, weight: Tensor) -> None:
    """What is made anew in each step and then written, and what depends on nothing."""
    scratch, fixed = torch.zeros(4, 6), torch.arange(6.0) * 2
    scratch[:, 1:3] = b.x[:, 1:3]
    empty = torch.empty(4, 6)
    empty.copy_(scratch).add_(fixed)
    b.out.copy_(empty.clone().double().float())


def several(b: Buffers, weight: Tensor) -> None:
    values, order = b.x.sort(-1)
    b.out.copy_(values + order + torch.stack(b.x.split(2, -1)).sum())


def written(b: Buffers, weight: Tensor) -> None:
    """In place: at a position that moves, and at indices."""
    b.kept.index_copy_(1, b.position, b.x.sum(-1, keepdim=True))
    b.out[torch.arange(4), b.ids] = b.x.amax(-1)
    b.position.add_(1)


def ops(b: Buffers, weight: Tensor) -> None:
    """Ours, which are repeated without their wrappers."""
    drawn = sample(b.x, seed=torch.tensor([3]), step=b.position, row_ids=b.ids)
    keys = b.x.view(4, 1, 1, 6).expand(-1, -1, 9, -1) * torch.arange(9.0).view(9, 1)
    b.out.copy_(decode_attention(b.x.view(4, 1, 6), keys, keys, b.position, scale=0.4).view(4, 6))
    b.out[:, 0] += drawn.token_ids + drawn.logprob
    b.position.add_(1)


def writing_op(b: Buffers, weight: Tensor) -> None:
    """One of ours that writes to what it is given, to what stays as to what the step makes, beside what it returns."""
    scratch, keys = torch.zeros(4, 1, 9, 6), b.cache.view(4, 1, 9, 6)
    for values in (scratch, keys):
        new = (b.x * 2).view(4, 1, 6)
        seen = decode_attention(b.x.view(4, 1, 6), keys, values, b.position, scale=0.4, new_keys=new, new_values=new)
        b.out.copy_(seen.view(4, 6) @ weight + scratch.sum(2).view(4, 6))
    b.position.add_(1)


@pytest.mark.parametrize("work", [elementwise, products, packed, factories, several, written, ops, writing_op])
def test_a_repeated_step_does_what_the_step_does(work) -> None:
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    ours, theirs = Buffers(), Buffers()
    repeat = None
    for seed in range(5):
        ours.fill(seed), theirs.fill(seed)
        if seed == 3:
            weight.mul_(-2)  # new weights, at the same place
            for each in (ours, theirs):
                each.packed.data = torch.ops.mkldnn._reorder_linear_weight(weight)
        work(theirs, weight)
        if repeat is None:
            repeat = recording.capture(lambda: work(ours, weight), CPU)
        else:
            repeat()
        for name in ("out", "kept", "position", "cache"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), msg=f"{name}, step {seed}")


LOOKS = {
    "a number": lambda b: b.out.mul_(float(b.x.sum())),
    "a branch": lambda b: b.out.copy_(b.x) if b.x.sum() > 0 else None,
    "indices of what holds": lambda b: b.out[(b.x[:, 0] > 0).nonzero()[:, 0]].sum(),
    "a choice by a mask": lambda b: b.x[b.x > 0].sum(),
    "weights in another layout": lambda b: torch.ops.mkldnn._reorder_linear_weight(b.x),
    "a random number": lambda b: b.out.copy_(torch.rand(4, 6)),
}


@pytest.mark.parametrize("what", LOOKS)
def test_a_step_that_looks_at_values_is_repeated_as_it_is(what: str) -> None:
    buffers, calls = Buffers(), []
    buffers.fill(1)

    def step() -> None:
        calls.append(1)
        LOOKS[what](buffers)

    repeat = recording.capture(step, CPU)
    assert len(calls) == 1, "capturing runs the step once"
    repeat()
    assert len(calls) == 2


def test_a_step_with_large_results_is_repeated_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_BYTES", 100)
    buffers = Buffers()

    def step() -> None:
        buffers.out.copy_(buffers.x * 2 + 1)

    assert recording.capture(step, CPU) is step
    monkeypatch.setattr(recording, "MOST_BYTES", 4 * 4 * 6 * 3)
    assert recording.capture(step, CPU) is not step

    def views() -> None:
        for _ in range(20):
            buffers.out.copy_(buffers.x.view(6, 4).t().reshape(4, 6).view(4, 6)[:].expand(4, 6))

    monkeypatch.setattr(recording, "MOST_BYTES", 4 * 4 * 6 * 21)
    assert recording.capture(views, CPU) is not views, "a view takes no memory"


def test_results_share_memory_when_they_are_not_needed_at_once() -> None:
    buffers, seen = Buffers(), []

    def step() -> None:
        x = buffers.x
        for _ in range(50):
            x = x * 1.5 + 1
            seen.append(x)
        buffers.out.copy_(x)

    recording.capture(step, CPU)()
    assert len({tensor.untyped_storage().data_ptr() for tensor in seen}) <= 3


def test_what_nobody_needs_is_not_done_again() -> None:
    buffers = Buffers()

    def step() -> None:
        (buffers.x.exp() + 1).log()
        buffers.out.copy_(buffers.x.t().t().view(4, 6))

    repeat = recording.capture(step, CPU)
    with recording.Watch() as seen:
        repeat()
    assert [call.name for call in seen.calls] == ["copy_"]
