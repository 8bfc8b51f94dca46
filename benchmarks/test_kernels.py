"""Speed and memory of the fused ops, beside plain PyTorch and the peers that are installed.

    pytest benchmarks/test_kernels.py [--results FILE]

On a CPU at small shapes, on CUDA at the shapes of the targets, with DRY=1 at tiny ones. The limit is the time that the
products need at the GEMM rate, or the bytes at the copy bandwidth, both measured in the same run. Each candidate's
gradients are checked first; then all of them are timed in turn. Another project's that fails, or finds too little
memory, is noted and left out.
"""

import gc
from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch

from benchmarks.harness import DRY, Row, Timing, copy_bandwidth, gemm_rate, interleave
from benchmarks.kernel_candidates import (
    CROSS_ENTROPY,
    LINEAR,
    LOGITS,
    OBJECTIVES,
    REWARDED,
    SAMPLE,
    check_linear,
    close_head,
    exact_gradients,
    make_head,
    relative_error,
)

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
# K, V, Hs, Ht of the fused heads; K, V of logits; R, V of a sample.
if DRY:
    LINEAR_SHAPES, LOGITS_SHAPE, SAMPLE_SHAPE = [(32, 512, 32, 48)], (16, 512), (4, 512)
elif CUDA:
    LINEAR_SHAPES = [(8192, 151_936, 1024, 2048), (8192, 151_936, 2048, 4096)]
    LOGITS_SHAPE, SAMPLE_SHAPE = (8192, 151_936), (256, 151_936)
else:
    LINEAR_SHAPES, LOGITS_SHAPE, SAMPLE_SHAPE = [(128, 49_152, 576, 576)], (256, 49_152), (16, 49_152)
ROUNDS = 1 if DRY else 5


@cache
def bandwidth(device: torch.device) -> float:
    return copy_bandwidth(device)


@cache
def gemm_flops(K: int, V: int, H: int, device: torch.device) -> float:
    return gemm_rate(K, V, H, dtype=DTYPE, device=device)


def linear_floor(K: int, V: int, Hs: int, Ht: int, device: torch.device) -> tuple[int, float]:
    """FLOPs of three student products and one teacher product, and the seconds they take."""
    student, teacher = 2 * K * V * Hs, 2 * K * V * Ht
    seconds = 3 * student / gemm_flops(K, V, Hs, device) + (Ht and teacher / gemm_flops(K, V, Ht, device))
    return 3 * student + teacher, seconds


@pytest.fixture
def compare(benchmark, record, absent, device):
    """Times candidates in turn, records a row of each, and asserts that ours leads in time and memory.

    `make` gives a candidate's call, or skips; `floor` is the limit in seconds; `error_of` a candidate's error.
    """

    def run(
        group: str,
        candidates: Mapping[str, Callable],
        make: Callable,
        *,
        floor: float,
        rounds: int = ROUNDS,
        error_of: Callable[[Callable], float | None] = lambda candidate: None,
        **counts,
    ) -> dict[str, Timing]:
        calls, errors = {}, {}
        for name, candidate in candidates.items():
            reason = ""
            try:
                call = make(candidate)
                call()  # warms up
                errors[name] = error_of(candidate)
                calls[name] = call
            except pytest.skip.Exception as error:
                reason = str(error)
            # Whatever another project's code raises says nothing about ours.
            except Exception as error:
                if name.startswith("ours"):
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if reason:
                absent(group, name, reason)
                gc.collect()  # what the failed call held
        timings = interleave(calls, rounds=rounds, warmup=0, device=device, memory=True)
        for name, timing in timings.items():
            peak = timing.peak_bytes
            figures = {"fraction": floor / timing.median, "peak_bytes": peak, "error": errors[name]}
            record(Row(group, name, timing.median, timing.spread, **figures, **counts))
            benchmark.extra_info[name] = {"seconds": timing.median, "peak_bytes": peak}
        benchmark.group = group
        benchmark.pedantic(next(iter(calls.values())), rounds=1)
        return timings

    return run


def assert_leads(timings: dict[str, Timing]) -> None:
    """Ours is the fastest, and needs no more memory than any other; 1 MiB is what resident memory is counted in."""
    if DRY:
        return
    ours = timings["ours"]
    for name, timing in timings.items():
        if name != "ours":
            assert ours.median <= timing.median, f"{name} is faster"
            assert ours.peak_bytes <= timing.peak_bytes + 2**20, f"{name} needs less memory"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_distill_loss(compare, device, shape, objective):
    """Forward and backward, both gradients; their error where student and teacher are close is at most 0.25 %."""
    K, V, Hs, Ht = shape
    head, close = make_head(K, V, Hs, Ht, device, DTYPE), close_head(V, Hs, device)

    def make(candidate):
        call = candidate(head, objective)
        check_linear(candidate, objective, V, Hs, Ht, device, DTYPE)
        return call

    flops, floor = linear_floor(K, V, Hs, Ht, device)
    group = f"linear_distill_loss {objective} K {K} V {V} H {Hs}/{Ht} {DTYPE}"
    # Weights, hidden states and both gradients, each once: what no chunking can avoid.
    least = DTYPE.itemsize * (V * (2 * Hs + Ht) + K * (2 * Hs + Ht))
    counts = {"flops": flops, "bytes": least, "floor": floor}
    truth = exact_gradients(close, objective)

    def error_of(candidate):
        error = relative_error(candidate(close, objective)(), truth)
        assert candidate is not LINEAR["ours"] or error <= 2.5e-3
        return error

    assert_leads(compare(group, LINEAR, make, error_of=error_of, **counts))


@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_a_rewards_term_in_the_same_pass(compare, device, shape):
    """The exact reverse KL with the sampled term of a task, without it, and with it by a pass of its own."""
    K, V, Hs, Ht = shape
    head = make_head(K, V, Hs, Ht, device, DTYPE)
    flops, floor = linear_floor(K, V, Hs, Ht, device)
    group = f"reverse_kl and a reward K {K} V {V} H {Hs}/{Ht} {DTYPE}"
    timings = compare(group, REWARDED, lambda candidate: candidate(head), flops=flops, floor=floor)
    ours, twice = (timings[name].median for name in ("ours", "a second pass"))
    assert DRY or ours <= 1.05 * twice


@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_cross_entropy(compare, device, shape):
    """Beside the fused cross entropies: the loss of tokens that are taken as right, without a teacher."""
    K, V, H, _ = shape
    head = make_head(K, V, H, H, device, DTYPE)

    def make(candidate):
        call = candidate(head, "cross_entropy")
        check_linear(candidate, "cross_entropy", V, H, H, device, DTYPE)
        return call

    flops, floor = linear_floor(K, V, H, 0, device)
    compare(f"cross entropy K {K} V {V} H {H} {DTYPE}", CROSS_ENTROPY, make, flops=flops, floor=floor)


def test_reverse_kl(compare, device):
    """Forward and backward from logits: two rows read, then two read and one written."""
    K, V = LOGITS_SHAPE
    student, teacher = (torch.randn(K, V, device=device).to(DTYPE) for _ in range(2))
    student.requires_grad_()
    token_ids = torch.randint(V, (K,), device=device)
    exact = LOGITS["pytorch"](student.detach()[:16].double().requires_grad_(), teacher[:16].double(), token_ids[:16])()

    def make(candidate):
        (found,) = candidate(student[:16], teacher[:16], token_ids[:16])()
        assert (found.double() - exact[0]).norm() <= (1e-2 if CUDA else 1e-4) * exact[0].norm()
        return candidate(student, teacher, token_ids)

    moved = 5 * K * V * DTYPE.itemsize
    assert_leads(compare(f"reverse_kl K {K} V {V} {DTYPE}", LOGITS, make, bytes=moved, floor=moved / bandwidth(device)))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sample(compare, device, top_p):
    """One token a row; the floor is one read of the logits."""
    R, V = SAMPLE_SHAPE
    logits = (torch.randn(R, V, device=device) * 2).to(DTYPE)

    def make(candidate):
        call = candidate(logits, top_p)
        token_ids, logprob, _ = call()
        right = logits.double().log_softmax(-1).gather(1, token_ids.view(-1, 1))
        assert torch.allclose(logprob.double().view(-1, 1), right, atol=1e-4)
        return call

    moved = R * V * DTYPE.itemsize
    group = f"sample R {R} V {V} top_p {top_p} {DTYPE}"
    assert_leads(compare(group, SAMPLE, make, bytes=moved, floor=moved / bandwidth(device), rounds=4 * ROUNDS))


@pytest.mark.skipif(CUDA or DRY, reason="the target of the CPU path")
def test_cpu_target(compare, device):
    """K 2,048, V 49,152, H 576: at most 1.1 x the time of full logits, at most an eighth of their extra memory."""
    K, V, H = 2048, 49_152, 576
    head = make_head(K, V, H, H, device, torch.float32)
    flops, floor = linear_floor(K, V, H, H, device)
    group = f"CPU target: linear_distill_loss reverse_kl K {K} V {V} H {H}"
    timings = compare(
        group, LINEAR, lambda candidate: candidate(head, "reverse_kl"), flops=flops, floor=floor, rounds=2
    )
    assert_leads(timings)
    assert timings["ours"].median <= 1.1 * timings["pytorch"].median
    assert timings["ours"].peak_bytes <= timings["pytorch"].peak_bytes / 8
