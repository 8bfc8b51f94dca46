"""Attention of a micro-batch's packed tokens on a GPU, one layer, at the sizes of Qwen3-0.6B (128 a head), SmolLM2 (64)
and Gemma (256), forward and with its backward, beside PyTorch's variable-length flash kernels, which take rows that
each repeat their prompt. And a model whose layers see a window, its prompt shared and repeated.

With DRY=1 at toy sizes on a CPU, where PyTorch has another kernel for rows.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DRY, Row, gemm_rate, gpu_or_cpu, interleave
from benchmarks.make_models import SMALL, random_model
from distill.forward.hidden import padded_hidden, shared_hidden
from distill.forward.packing import Rows
from distill_kernels import PrefixLayout, Shared, prefix_attention

P, T, N = (16, 8, 4) if DRY else (256, 512, 16)
HEADS = {16: (4, 2)} if DRY else {128: (16, 8), 64: (9, 3), 256: (8, 4)}
CALLS = 1 if DRY else 20  # that one sample times, as one graph: without what the host takes
DTYPE = torch.float32 if DRY else torch.bfloat16


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """CALLS calls one after the other: as a graph on a GPU."""
    return captured_each([call] * CALLS)


def captured_each(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """These calls one after the other: as a graph on a GPU."""

    def repeated() -> None:
        for call in calls:
            call()

    if gpu_or_cpu().type == "cpu":
        return repeated
    repeated()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeated()

    def replay(_held: list[Callable[[], object]] = calls) -> None:  # what it reads has to stay where it is
        graph.replay()

    return replay


def tokens(length: int, D: int) -> list[Tensor]:
    """Query, key and value [length, heads, D]."""
    heads, kv_heads = HEADS[D]
    made = (torch.randn(length, h, D, device=gpu_or_cpu(), dtype=DTYPE) for h in (heads, kv_heads, kv_heads))
    return [each.requires_grad_() for each in made]


def flash_over_rows(query: Tensor, key: Tensor, value: Tensor, D: int) -> Tensor:
    """Causal attention of N rows of P + T - 1 tokens, one after the other."""
    length = P + T - 1
    if DRY:
        rows = (each.unflatten(0, (N, length)).transpose(1, 2) for each in (query, key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*rows, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    ends = torch.arange(0, N * length + 1, length, device=query.device, dtype=torch.int32)
    flash = torch.ops.aten._flash_attention_forward
    return flash(query, key, value, ends, ends, length, length, 0.0, True, False, scale=D**-0.5)[0]


def pairs() -> int:
    """Of a query and a key that it sees, of packed tokens."""
    return P * (P + 1) // 2 + N * (T - 1) * P + N * (T - 1) * T // 2


@pytest.mark.cuda
@pytest.mark.parametrize("D", HEADS)
def test_packed_attention_on_a_gpu(D: int, record) -> None:
    """The fractions are of a product's rate, for the 2 products forward and 5 backward that each pair needs."""
    device = gpu_or_cpu()
    layout = PrefixLayout(
        [P] + [T - 1] * N, [Shared(0, P, P, N * (T - 1))], lambda index: index.to(device, non_blocking=True)
    )
    ways = {
        "ours": (tokens(P + N * (T - 1), D), lambda *packed: prefix_attention(*packed, layout, D**-0.5)),
        "PyTorch's flash kernels, rows that repeat their prompt": (
            tokens(N * (P + T - 1), D),
            partial(flash_over_rows, D=D),
        ),
    }
    forward, both = {}, {}
    for name, (inputs, attend) in ways.items():
        upstream = torch.randn_like(attend(*inputs).detach())
        forward[name] = captured(lambda inputs=inputs, attend=attend: attend(*(each.detach() for each in inputs)))
        both[name] = captured(
            lambda inputs=inputs, attend=attend, upstream=upstream: torch.autograd.grad(
                attend(*inputs), inputs, upstream
            )
        )
    side = 64 if DRY else 8192
    rate = gemm_rate(side, side, side, dtype=DTYPE, device=device)
    sizes = f"heads of {D}, {N} rollouts of {T} tokens of a prompt of {P}"
    for kind, calls, products in (("forward", forward, 2), ("forward and backward", both, 7)):
        flops = products * 2 * D * HEADS[D][0] * pairs()
        for name, timing in interleave(calls, device=device).items():
            seconds = timing.median / CALLS
            of_limit = flops / rate / seconds
            record(
                Row(
                    f"{kind} of packed attention, {sizes}", name, seconds, timing.spread, flops=flops, fraction=of_limit
                )
            )


@pytest.mark.cuda
def test_sharing_through_a_window_on_a_gpu(record) -> None:
    """Forward and backward under autocast of 8 layers of Qwen3-0.6B's sizes, with a window of 256 tokens."""
    device, layers, window = gpu_or_cpu(), 2 if DRY else 8, 12 if DRY else 256
    seen = {"use_sliding_window": True, "sliding_window": window, "layer_types": ["sliding_attention"] * layers}
    body = random_model({**SMALL, "num_hidden_layers": layers, **seen}).base_model
    rows = Rows([P], [T] * N, [0] * N)
    token_ids = [torch.randint(5, 200, shape, device=device) for shape in ((1, P), (N, T))]

    def run(way: Callable[..., Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = way(body, *token_ids, rows)
        body.zero_grad()
        hidden.float().square().mean().backward()
        return hidden.detach()

    ways = {"ours": shared_hidden, "rows that repeat their prompt": padded_hidden}
    shared, repeated = map(run, ways.values())
    assert (shared - repeated).norm() <= 0.05 * repeated.norm()
    calls = {name: partial(run, way) for name, way in ways.items()}
    for name, timing in interleave(calls, device=device, memory=True).items():
        group = f"{layers} layers with a window of {window}, {N} rollouts of {T} tokens of a prompt of {P}"
        record(Row(group, name, timing.median, timing.spread, peak_bytes=timing.peak_bytes, tokens=N * T))
