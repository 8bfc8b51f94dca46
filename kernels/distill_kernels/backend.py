"""Which implementation a call runs: by the device of its tensors, and by nothing else.

CUDA tensors run the Triton kernels, CPU tensors their PyTorch twins. `interpreted()` is the one exception, for
tests: inside it, CPU tensors run the Triton source through Triton's interpreter. The modules with Triton source are
imported at first use, because Triton decides between compiler and interpreter when a kernel is defined.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

_interpreting = False


def rows(device: torch.device) -> ModuleType:
    """The module with the row functions (`token_stats`, `distill_rows`, ...) for this device."""
    if _runs_triton(device):
        from distill_kernels import triton_rows

        return triton_rows
    from distill_kernels import twin_rows

    return twin_rows


def sampler(device: torch.device) -> ModuleType:
    """The module with `sample_rows` for this device."""
    if _runs_triton(device):
        from distill_kernels import triton_sample

        return triton_sample
    from distill_kernels import twin_sample

    return twin_sample


def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" or _interpreting


@contextmanager
def interpreted() -> Iterator[None]:
    """Runs the Triton source on CPU tensors; raises RuntimeError unless TRITON_INTERPRET=1 is set."""
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before the first kernel runs: Triton source needs it on a CPU")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before
