"""Which implementation a call runs: by the device of its tensors, and by nothing else.

CUDA tensors run the Triton kernels, CPU tensors their PyTorch twins. `interpreted()` is the one exception, for
tests: inside it, CPU tensors run the Triton source through Triton's interpreter. The modules with Triton source are
imported at first use, because Triton decides between compiler and interpreter when a kernel is defined.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch

_interpreting = False

REPEATED: dict[str, Callable[..., Callable[[], None]]] = {}
"""By the name of an op: a function of the results to write and the op's arguments that gives what makes the call again.

For whoever repeats a call at fixed addresses many thousand times; without the checks and wrappers of an op.
"""


def implementation(of: str, device: torch.device) -> ModuleType:
    """The module `triton_{of}` or `twin_{of}`, which hold the same functions: of `rows`, `sample` and so on."""
    return import_module(f"distill_kernels.{'triton' if runs_triton(device) else 'twin'}_{of}")


def runs_triton(device: torch.device) -> bool:
    """Whether tensors of this device run Triton source."""
    return device.type == "cuda" or _interpreting


def interpreting() -> bool:
    """Whether CPU tensors run the Triton source now."""
    return _interpreting


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
