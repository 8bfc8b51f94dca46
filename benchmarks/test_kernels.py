"""Speed and memory of the fused ops, beside plain PyTorch and the peers that are installed.

    pytest benchmarks/test_kernels.py [--results FILE]

On a CPU at small shapes, on CUDA at the shapes of the targets. The limit is the time that the products need at the
GEMM rate, or the bytes at the copy bandwidth, both measured in the same run.
"""

from functools import cache

import pytest
import torch

from benchmarks.harness import Row, copy_bandwidth, gemm_rate, interleave, peak_memory
from benchmarks.kernel_candidates import LINEAR, LOGITS, SAMPLE, check_linear, make_head

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
LINEAR_SHAPES = (
    [(8192, 151_936, 1024, 2048), (8192, 151_936, 2048, 4096)] if CUDA else [(128, 49_152, 576, 576)]
)  # K, V, Hs, Ht
LOGITS_SHAPE = (8192, 151_936) if CUDA else (256, 49_152)
SAMPLE_SHAPE = (256, 151_936) if CUDA else (16, 49_152)
ROUNDS = 10 if CUDA else 3


@cache
def bandwidth(device: torch.device) -> float:
    return copy_bandwidth(device)


@cache
def gemm_flops(K: int, V: int, H: int, device: torch.device) -> float:
    return gemm_rate(K, V, H, dtype=DTYPE, device=device)


def linear_floor(K: int, V: int, Hs: int, Ht: int, device: torch.device) -> tuple[int, float]:
    """FLOPs of three student products and one teacher product, and the seconds they take."""
    student, teacher = 2 * K * V * Hs, 2 * K * V * Ht
    seconds = 3 * student / gemm_flops(K, V, Hs, device) + teacher / gemm_flops(K, V, Ht, device)
    return 3 * student + teacher, seconds


def measure(benchmark, record, call, device, *, group: str, name: str, **counts) -> Row:
    """The call's peak memory, then its time by pytest-benchmark, and the row of both; `floor` is in seconds."""

    def finished():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = group
    finished()
    peak = peak_memory(call, device)
    benchmark.pedantic(finished, rounds=ROUNDS)
    floor = counts.pop("floor")
    seconds = benchmark.stats.stats.median
    spread = (benchmark.stats.stats.max - benchmark.stats.stats.min) / seconds
    row = Row(group, name, seconds, spread, fraction=floor / seconds, peak_bytes=peak, **counts)
    benchmark.extra_info |= {"bytes": row.bytes, "flops": row.flops, "fraction_of_limit": row.fraction}
    benchmark.extra_info["peak_bytes"] = row.peak_bytes
    record(row)
    return row


@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_reverse_kl"])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_distill_loss(benchmark, record, device, name, shape, objective):
    """Forward and backward, both gradients."""
    K, V, Hs, Ht = shape
    call = LINEAR[name](make_head(K, V, Hs, Ht, device, DTYPE), objective)
    check_linear(name, objective, V, Hs, Ht, device, DTYPE)
    flops, floor = linear_floor(K, V, Hs, Ht, device)
    group = f"linear_distill_loss {objective} K {K} V {V} H {Hs}/{Ht} {DTYPE}"
    # Weights, hidden states and both gradients, each once: what no chunking can avoid.
    least = DTYPE.itemsize * (V * (2 * Hs + Ht) + K * (2 * Hs + Ht))
    measure(benchmark, record, call, device, group=group, name=name, flops=flops, bytes=least, floor=floor)


@pytest.mark.parametrize("name", LOGITS)
def test_reverse_kl(benchmark, record, device, name):
    """Forward and backward from logits: two rows read, then two read and one written."""
    K, V = LOGITS_SHAPE
    student, teacher = (torch.randn(K, V, device=device).to(DTYPE) for _ in range(2))
    call = LOGITS[name](student.requires_grad_(), teacher, torch.randint(V, (K,), device=device))
    moved = 5 * K * V * DTYPE.itemsize
    group = f"reverse_kl K {K} V {V} {DTYPE}"
    measure(benchmark, record, call, device, group=group, name=name, bytes=moved, floor=moved / bandwidth(device))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("name", SAMPLE)
def test_sample(benchmark, record, device, name, top_p):
    """One token a row; the floor is one read of the logits."""
    R, V = SAMPLE_SHAPE
    logits = (torch.randn(R, V, device=device) * 2).to(DTYPE)
    moved = R * V * DTYPE.itemsize
    group = f"sample R {R} V {V} top_p {top_p} {DTYPE}"
    floor = moved / bandwidth(device)
    measure(benchmark, record, SAMPLE[name](logits, top_p), device, group=group, name=name, bytes=moved, floor=floor)


@pytest.mark.skipif(CUDA, reason="the target of the CPU path")
def test_cpu_target(benchmark, record, device):
    """K 2,048, V 49,152, H 576: at most 1.1 x the time of full logits, at most an eighth of their extra memory,
    not slower than the peers that are installed; all timed in turn."""
    K, V, H = 2048, 49_152, 576
    head, calls = make_head(K, V, H, H, device, torch.float32), {}
    for name, candidate in LINEAR.items():
        try:
            calls[name] = candidate(head, "reverse_kl")
        except pytest.skip.Exception:
            continue
        check_linear(name, "reverse_kl", V, H, H, device, torch.float32)
    timings = interleave(calls, rounds=3, warmup=0, memory=True)
    flops, floor = linear_floor(K, V, H, H, device)
    group = f"CPU target: linear_distill_loss reverse_kl K {K} V {V} H {H}"
    for name, timing in timings.items():
        fraction = floor / timing.median
        peak = timing.peak_bytes
        record(Row(group, name, timing.median, timing.spread, flops=flops, fraction=fraction, peak_bytes=peak))
        benchmark.extra_info[name] = {"seconds": timing.median, "peak_bytes": peak}
    benchmark.pedantic(calls["ours"], rounds=1)
    assert timings["ours"].median <= 1.1 * timings["pytorch"].median
    assert timings["ours"].peak_bytes <= timings["pytorch"].peak_bytes / 8
    assert all(timings["ours"].median <= timing.median for name, timing in timings.items() if name != "pytorch")
