"""Memory that is freed while a CPU trains stays with the process."""

import resource

import pytest
import torch

from distill.runtime import free_bytes, freed_memory_kept
from distill.runtime.heap import _glibc, kept_bytes

CPU = torch.device("cpu")
SIZE = 200 * 2**20  # bytes

pytestmark = pytest.mark.skipif(_glibc() is None, reason="another C library than glibc 2.33 or newer")


def take() -> torch.Tensor:
    return torch.ones(SIZE // 4)


def test_freed_memory_is_there_for_the_next_step_and_given_back_at_the_end():
    take()
    assert kept_bytes() < SIZE
    with freed_memory_kept(CPU):
        take()
        assert kept_bytes() >= SIZE
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        take()  # without a page that the system would have to clear
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < SIZE // resource.getpagesize() / 20
    assert kept_bytes() < SIZE
    take()
    assert kept_bytes() < SIZE


def test_what_is_kept_counts_as_free():
    with freed_memory_kept(CPU):
        held = take()
        taken = free_bytes(CPU)
        del held
        assert free_bytes(CPU) - taken > SIZE / 2


def test_a_gpu_is_left_alone():
    with freed_memory_kept(torch.device("cuda")):
        take()
        assert kept_bytes() < SIZE
