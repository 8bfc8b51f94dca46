"""What a machine can do: public peak figures of GPUs, or limits measured here; and how much of them the parts reach.

Peaks are NVIDIA's, dense (no sparsity), of the SXM boards where there are several; memory is what the driver reports.
The efficiencies were set once, to points that were measured (measured.py): on a CPU, and on one H200, whose processor
launched slowly. Other GPUs, more than one of them and other models are taken to reach the same.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.harness import copy_bandwidth, gemm_rate
from distill.runtime import free_bytes

GIB = 2**30


class Efficiency(NamedTuple):
    """Which part of a limit is reached, and what the limits do not show."""

    body: float  # of the products' peak, in the layers
    head: float  # of the products' peak, in the fused head
    attention: float  # of the products' peak, in attention
    copying: float  # of the bandwidth, where weights and keys are read and activations passed on
    rows: float  # of the bandwidth, in the fused head's row function and in the sampler
    layer_seconds: float  # to launch one layer's forward, while a GPU computes; a backward takes twice that
    decode_layer_seconds: float  # to launch one layer of a decode step, a plain one where there are others
    runtime_bytes: int  # interpreter and libraries, or the CUDA context


GPU = Efficiency(0.7, 0.5, 0.4, 0.75, 0.6, 1.55e-3, 2.6e-5, GIB)
CPU = Efficiency(0.95, 0.95, 0.3, 0.8, 0.3, 1e-3, 8e-4, int(0.55 * GIB))


@dataclass(frozen=True)
class Machine:
    """One device, and how it is joined to others."""

    name: str
    memory: float
    """Bytes."""
    flops: dict[int, float]
    """Of matrix products, a second, by the bytes of an operand: 4 float32, 2 bfloat16."""
    bandwidth: float
    """Bytes a second, read or written."""
    link: float = 0.0
    """Bytes a second and direction to the devices of the same machine."""
    efficiency: Efficiency = GPU
    cuda: bool = True

    def busy(self, flops: float, itemsize: int, part: float, moved: float = 0.0) -> float:
        """Seconds of a product that reaches `part` of the peak, or of the bytes that it moves if those take longer."""
        return max(flops / (self.flops[itemsize] * part), self.moving(moved))

    def moving(self, moved: float) -> float:
        return moved / (self.bandwidth * self.efficiency.copying)


# Between machines: 400 Gbit/s a GPU. PCIe 4.0 x16: 32 GB/s; collectives reach some 70 % of either.
NETWORK = 50e9
COLLECTIVE = 0.7
NODE = 8


def _gpu(name: str, gib: float, dense: float, single: float, bandwidth: float, link: float) -> Machine:
    return Machine(name, gib * GIB, {2: dense * 1e12, 4: single * 1e12}, bandwidth * 1e9, link * 1e9)


GPUS = {
    "rtx4090": _gpu("RTX 4090", 24, 165, 82.6, 1008, 32),
    "l40s": _gpu("L40S", 45, 362, 91.6, 864, 32),
    "a100-40": _gpu("A100 40 GB", 40, 312, 19.5, 1555, 300),
    "a100-80": _gpu("A100 80 GB", 80, 312, 19.5, 2039, 300),
    "h100": _gpu("H100 80 GB", 79, 989, 66.9, 3350, 450),
    "h200": _gpu("H200 141 GB", 140, 989, 66.9, 4800, 450),
}


def this_cpu() -> Machine:
    """The processor of this machine, by two short products and a copy."""
    flops = {4: gemm_rate(256, 4096, 2048), 2: gemm_rate(256, 4096, 2048, dtype=torch.bfloat16)}
    cpu = torch.device("cpu")
    return Machine("this CPU", free_bytes(cpu), flops, copy_bandwidth(cpu, 2**27), efficiency=CPU, cuda=False)
