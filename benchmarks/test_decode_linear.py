"""The four products of a plain layer's decode step on a GPU, at the sizes of Qwen3-0.6B: each with what stands around
it in one launch, beside cuBLAS's product alone and what PyTorch makes of the whole.

Calls are timed in captured graphs, each on a layer's own weights, so that no cache holds what a real step would have to
read. With DRY=1 at toy sizes on a CPU.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DRY, Row, copy_bandwidth, gpu_or_cpu, interleave
from benchmarks.test_prefix_attention import captured_each
from distill_kernels import Norm, added, begun, normed_gate, normed_heads

LAYERS = 2 if DRY else 28
HIDDEN, HEADS, KV_HEADS, SIZE, INNER = (32, 4, 2, 8, 48) if DRY else (1024, 16, 8, 128, 3072)
ROWS = (3,) if DRY else (16, 64, 256)
DTYPE = torch.float32 if DRY else torch.bfloat16
EPS = 1e-6


class Layer(NamedTuple):
    """Weights of query, key and value, of the output, of gate and up, and of down."""

    heads: list[Tensor]
    output: Tensor
    gates: list[Tensor]
    down: Tensor


def weight(rows: int, columns: int) -> Tensor:
    return (columns**-0.5 * torch.randn(rows, columns, device=gpu_or_cpu())).to(DTYPE)


def layer() -> Layer:
    """Weights that read one input lie one behind the other, as they do in a generation copy."""
    heads = weight((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN).split([n * SIZE for n in (HEADS, KV_HEADS, KV_HEADS)])
    gates = weight(2 * INNER, HIDDEN).split(INNER)
    return Layer(list(heads), weight(HIDDEN, HEADS * SIZE), list(gates), weight(HIDDEN, INNER))


def plain_heads(x: Tensor, norm: Tensor, joined: Tensor, norms: list[Norm], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Query, key and value in PyTorch."""
    normed = torch.nn.functional.rms_norm(x, (HIDDEN,), norm, EPS)
    found = list((normed @ joined.t()).unflatten(1, (-1, SIZE)).split([HEADS, KV_HEADS, KV_HEADS], 1))
    for kind, head_norm in enumerate(norms):
        each = torch.nn.functional.rms_norm(found[kind], (SIZE,), head_norm.weight, EPS)
        one, two = each.chunk(2, -1)
        found[kind] = each * cos[:, None].to(DTYPE) + torch.cat([-two, one], -1) * sin[:, None].to(DTYPE)
    return found


def plain_gate(x: Tensor, norm: Tensor, joined: Tensor) -> Tensor:
    gates, ups = (torch.nn.functional.rms_norm(x, (HIDDEN,), norm, EPS) @ joined.t()).chunk(2, 1)
    return torch.nn.functional.silu(gates) * ups


@pytest.mark.cuda
@pytest.mark.parametrize("R", ROWS)
def test_products_of_a_decode_step_on_a_gpu(R: int, record) -> None:
    device, limit = gpu_or_cpu(), copy_bandwidth(gpu_or_cpu())
    torch.manual_seed(R)
    layers = [layer() for _ in range(LAYERS)]
    x, y, z = (torch.randn(R, width, device=device).to(DTYPE) for width in (HIDDEN, HEADS * SIZE, INNER))
    norm, norms = 1 + weight(1, HIDDEN)[0], [Norm(1 + weight(1, SIZE)[0], EPS) for _ in range(2)]
    cos, sin = torch.randn(2, R, SIZE, device=device)
    stream = begun(x, norm)
    joined = {"heads": [torch.cat(each.heads) for each in layers], "gates": [torch.cat(each.gates) for each in layers]}
    plain = {
        "query, key and value": (
            lambda i: normed_heads(stream, EPS, layers[i].heads, [None] * 3, SIZE, tuple(norms), cos, sin),
            lambda i: x @ joined["heads"][i].t(),
            lambda i: plain_heads(x, norm, joined["heads"][i], norms, cos, sin),
        ),
        "output": (
            lambda i: added(y, layers[i].output, None, x, norm),
            lambda i: y @ layers[i].output.t(),
            lambda i: x + y @ layers[i].output.t(),
        ),
        "gate and up": (
            lambda i: normed_gate(stream, EPS, *layers[i].gates),
            lambda i: x @ joined["gates"][i].t(),
            lambda i: plain_gate(x, norm, joined["gates"][i]),
        ),
        "down": (
            lambda i: added(z, layers[i].down, None, x, norm),
            lambda i: z @ layers[i].down.t(),
            lambda i: x + z @ layers[i].down.t(),
        ),
    }
    moved = {
        "query, key and value": joined["heads"][0].nbytes, "output": layers[0].output.nbytes,
        "gate and up": joined["gates"][0].nbytes, "down": layers[0].down.nbytes,
    }  # fmt: skip
    for name, (ours, product, pytorch) in plain.items():
        check(ours(0), pytorch(0))
        ways: dict[str, Callable[[int], object]] = {
            "ours": ours,
            "cuBLAS, the product alone": product,
            "pytorch": pytorch,
        }
        calls = {way: captured_each([partial(call, i) for i in range(LAYERS)]) for way, call in ways.items()}
        timings = interleave(calls, rounds=3 if DRY else 15, device=device)
        group = f"{name}, {R} rows, a layer of Qwen3-0.6B in a decode step"
        for way, timing in timings.items():
            seconds = timing.median / LAYERS
            fraction = moved[name] / limit / seconds
            record(Row(group, way, seconds, timing.spread, bytes=moved[name], fraction=fraction))


def check(ours: object, pytorch: object) -> None:
    """Within some roundings of the largest."""
    ours = ours.hidden if hasattr(ours, "hidden") else ours
    pairs = zip(ours, pytorch, strict=True) if isinstance(pytorch, list) else [(ours, pytorch)]
    for each, other in pairs:
        apart = (each - other).abs().max() / other.abs().max()
        assert apart < (1e-5 if DRY else 2e-2), f"{apart:.1e}"
