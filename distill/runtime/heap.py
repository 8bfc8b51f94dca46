"""What glibc does with memory that is freed, while a CPU trains.

A step takes and frees the same gigabytes again and again. Large blocks go back to the system as soon as they are freed,
and whoever takes the next one has the system clear it, page by page: a seventh of the time of an update. Kept in the
process they are there for the next step. The most that is taken at once stays what it was.
"""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGEST_THRESHOLD = 32 * 2**20  # that glibc comes to by itself


@contextlib.contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Inside it what a CPU's tensors took stays with the process; at the end all of that is given back.

    Without effect for another device, and where the C library is another.
    """
    library = _glibc() if device.type == "cpu" else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, 65_536)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        library.malloc_trim(0)


def kept_bytes() -> int:
    """What the process has and nothing uses."""
    library = _glibc()
    return 0 if library is None else library.mallinfo2().fordblks


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2`."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it has what is asked for here (glibc 2.33)."""
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallopt", "malloc_trim", "mallinfo2")):
        return None
    library.mallinfo2.restype = _MallInfo
    return library
