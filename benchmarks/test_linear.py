"""A float32 linear layer on a CPU, forward and backward: PyTorch's own product beside oneDNN's.

pytest benchmarks/test_linear.py
"""

import pytest
import torch
from torch import nn

from benchmarks.harness import Row, interleave
from distill.forward.cpu_linear import OneDnnLinears


@pytest.mark.skipif(torch.cuda.is_available(), reason="a measurement of the CPU path")
@pytest.mark.parametrize("shape", [(346, 576, 1536), (346, 1536, 576), (1024, 576, 576)], ids=str)
def test_linear(benchmark, record, device, shape):
    """Tokens, inputs and outputs of the layers of SmolLM2-135M."""
    tokens, inputs, outputs = shape
    rows, layer = torch.randn(tokens, inputs, requires_grad=True), nn.Linear(inputs, outputs, bias=False)
    upstream = torch.randn(tokens, outputs)

    def pytorch():
        for _ in range(20):
            layer(rows).backward(upstream)

    def ours():
        with OneDnnLinears():
            pytorch()

    timings = interleave({"ours": ours, "pytorch": pytorch}, rounds=7, warmup=2)
    for name, timing in timings.items():
        seconds = timing.median / 20
        record(Row(f"linear {shape} float32", name, seconds, timing.spread, flops=6 * tokens * inputs * outputs))
        benchmark.extra_info[name] = {"seconds": seconds}
    benchmark.pedantic(ours, rounds=1)
