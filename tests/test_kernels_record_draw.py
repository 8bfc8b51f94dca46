"""`record_draw`: what a row says up to its end and no further, in the very bits that were drawn."""

import pytest
import torch
from kernels_common import over_implementations, running

from distill_kernels import Sample, record_draw, reference

NAN = float("nan")


def arguments(R, N=None, T=5, *, ends=(5, 6), ended=(), step=2, seed=1):
    """R of N completions, in any order; draws among 8 tokens, NaN where the row has ended before."""
    generator = torch.Generator().manual_seed(seed)
    N = R if N is None else N
    over = torch.zeros(R, dtype=torch.bool)
    over[list(ended)] = True
    drawn = torch.randn(2, R, generator=generator).masked_fill_(over, NAN)
    return {
        "drawn": Sample(torch.randint(8, (R,), generator=generator), *drawn),
        "step": step,
        "rows": torch.randperm(N, generator=generator)[:R],
        "ended": over,
        "ends": torch.tensor(ends, dtype=torch.int64),
        "pad_token_id": 7,
        "token_ids": torch.full((N, T), -9),
        "lengths": torch.randint(2**40, (N,), generator=generator),
        "logprob": torch.full((N, T), NAN),
        "sampling_logprob": torch.full((N, T), NAN),
        "finished": torch.zeros(N, dtype=torch.bool),
    }


def to(device, made):
    """Copies, on a device."""
    moved = {n: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v for n, v in made.items()}
    return moved | {"drawn": Sample(*(vector.to(device, copy=True) for vector in made["drawn"]))}


def check(made, implementation):
    """Every buffer, all of it, to the bit."""
    expected = to("cpu", made)
    go_on = reference.record_draw(**expected)
    with running(implementation) as device:
        ours = to(device, made)
        assert torch.equal(record_draw(**ours).cpu(), go_on)
    for name, tensor in ours.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(tensor.cpu(), expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@over_implementations
@pytest.mark.parametrize("R", [1, 2, 16, 127, 128, 300])
def test_rows(implementation, R):
    for ended in ((), (0,), range(0, R, 3), range(R)):
        check(arguments(R, R + 5, ended=ended), implementation)


@over_implementations
@pytest.mark.parametrize("ends", [(), (5,), (5, 6, 0), (7,), tuple(range(8))], ids=str)
def test_ends(implementation, ends):
    """None, many, all tokens, and padding, at which a row that draws it ends."""
    check(arguments(40, ends=ends, ended=(3, 4)), implementation)


@over_implementations
@pytest.mark.parametrize("step", [0, 4])
def test_steps(implementation, step):
    """As a number and as a tensor."""
    made = arguments(9, 12, step=step, ended=(2,))
    check(made, implementation)
    check(made | {"step": torch.tensor([step])}, implementation)


@over_implementations
def test_no_rows_at_all(implementation):
    check(arguments(0, 3), implementation)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_graph_on_cuda_follows_the_step_and_the_ends():
    ours = to("cuda", arguments(48, 64, T=40) | {"step": torch.tensor([0])})
    expected = to("cpu", ours)
    record_draw(**to("cuda", ours))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        go_on = record_draw(**ours)
    for step in range(40):
        for made in (ours, expected):
            made["step"].fill_(step)
        token_ids = torch.randint(100, (48,))
        ours["drawn"].token_ids.copy_(token_ids), expected["drawn"].token_ids.copy_(token_ids)
        graph.replay()
        assert torch.equal(go_on.cpu(), reference.record_draw(**expected))
    for name, tensor in ours.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(tensor.cpu(), expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logprob": torch.zeros(3, 6)}, ["logprob", "[3, 5]", "[3, 6]"]),
        ({"finished": torch.zeros(4).bool()}, ["finished", "[3]", "[4]"]),
        ({"token_ids": torch.zeros(5, 3).long().t()}, ["token_ids", "contiguous", "[1, 3]"]),
        ({"rows": torch.arange(2)}, ["rows", "[3]", "[2]"]),
    ],
)
def test_errors(change, words):
    with pytest.raises(ValueError, match=words[0]) as raised:
        record_draw(**arguments(3) | change)
    assert all(word in str(raised.value) for word in words), raised.value


@over_implementations
def test_registration(implementation):
    with running(implementation) as device:
        made = to(device, arguments(6, ended=(1,)) | {"step": torch.tensor([2])})
        values = [v.nan_to_num() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in made.values()]
        drawn = Sample(*(vector.nan_to_num() for vector in made["drawn"]))
        torch.library.opcheck(torch.ops.distill_kernels.record_draw.default, (*drawn, *values[1:]))
