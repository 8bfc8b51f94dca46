"""Attention of a micro-batch's packed tokens on a GPU, at Qwen3-0.6B's sizes, one layer: what merging prefix and own
attention takes beside PyTorch's operations, and the backward whole and with prompts' queries cut into pieces.

With DRY=1 at toy sizes on a CPU, where neither the kernel nor the cut is.
"""

from functools import partial

import pytest
import torch

from benchmarks.harness import DRY, Row, copy_bandwidth, gpu_or_cpu, interleave
from distill_kernels import PrefixLayout, Shared, prefix_attention, prefix_layout, twin_merge
from distill_kernels.flash_prefix import merge_attention

Hq, Hkv, D = (4, 2, 16) if DRY else (16, 8, 128)
P, T, N = (16, 8, 4) if DRY else (256, 512, 16)
CALLS = 1 if DRY else 20  # that one sample times, one after the other
DTYPE = torch.float32 if DRY else torch.bfloat16


def repeated(call) -> None:
    for _ in range(CALLS):
        call()


@pytest.mark.cuda
def test_merge_on_a_gpu(record) -> None:
    device = gpu_or_cpu()
    out, other = torch.randn(2, N * T, Hq, D, device=device, dtype=DTYPE)
    lse, other_lse = torch.randn(2, Hq, N * T, device=device).transpose(1, 2)
    moved = 3 * (out.nbytes + lse.nbytes)
    ways = {"ours": merge_attention, "PyTorch's operations": twin_merge.merge}
    calls = {name: partial(repeated, partial(way, out, lse, other, other_lse)) for name, way in ways.items()}
    timings, limit = interleave(calls, device=device), moved / copy_bandwidth(device)
    for name, timing in timings.items():
        seconds = timing.median / CALLS
        group = f"merge of two attentions, [{N * T}, {Hq}, {D}]"
        record(Row(group, name, seconds, timing.spread, bytes=moved, fraction=limit / seconds))


@pytest.mark.cuda
@pytest.mark.parametrize("prompts", [1, 2])
def test_backward_by_pieces_on_a_gpu(prompts: int, monkeypatch, record) -> None:
    """`ours` is cut as it chooses; with 0 programs nothing is cut."""
    device, fed = gpu_or_cpu(), T - 1
    shared = [Shared(P * i, P, P * prompts + i * N * fed, N * fed) for i in range(prompts)]
    segments = [P] * prompts + [fed] * (N * prompts)
    query, key, value = (
        torch.randn(sum(segments), heads, D, device=device, dtype=DTYPE, requires_grad=True) for heads in (Hq, Hkv, Hkv)
    )
    gradient, calls = torch.randn_like(query), {}
    for name, programs in (("ours", prefix_layout.PROGRAMS), ("whole", 0), ("twice the pieces", 264)):
        monkeypatch.setattr(prefix_layout, "PROGRAMS", programs)
        layout = PrefixLayout(segments, shared, lambda index: index.to(device))
        layout.cut(Hq)  # planned now, and for good
        out = prefix_attention(query, key, value, layout, D**-0.5)
        backward = partial(torch.autograd.grad, out, (query, key, value), gradient, retain_graph=True)
        calls[name] = partial(repeated, backward)
    group = f"backward of prefix attention, {prompts} prompts of {P} tokens, {N} rollouts of {T} tokens each"
    for name, timing in interleave(calls, device=device).items():
        record(Row(group, name, timing.median / CALLS, timing.spread))
