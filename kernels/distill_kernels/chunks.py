"""Chunks of rows of two heads' logits: how many rows the workspace holds, and the products of one chunk.

Products accumulate in float32 and leave float32 logits, whatever the inputs: logits rounded to bfloat16 would put
0.02 to 0.05 nats of noise into every log-probability. On CUDA that is cuBLAS with a float32 output. On a CPU no
such product exists, so half-precision weights are widened to float32 in blocks of `_CAST_BYTES`; a bfloat16 product
then runs on bfloat16 units where the CPU has them (see `_products`), which is exact, as the operands are. A float32
product goes to oneDNN, which returns new tensors only: logits are such a tensor. The weight gradient goes to MKL where
that is as fast, else to oneDNN in blocks of vocabulary of `_BLOCK_BYTES`, so that what it returns is still in the cache
when it is copied or added to where it belongs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distill_kernels import cpu_product

WORKSPACE_BYTES = {"cpu": 128 * 2**20, "cuda": 4 * 2**30}
"""Budget for the two logits buffers and the logits' gradient, when a call names none; of a GPU a 16th at most."""

ROW_ALIGNMENT = {"cuda": 64}
"""Elements of which a buffer's rows begin at a multiple, 1 where absent."""

_CAST_BYTES = 16 * 2**20  # of widened weights
_BLOCK_BYTES = 4 * 2**20  # of a product's result


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def rows_per_chunk(K: int, V: int, bytes_per_column: float, workspace_bytes: int | None, device: torch.device) -> int:
    """How many rows of V columns fit: at least 1, at most K, and where K does not fit a multiple of 16.

    On CUDA of 128, the rows of a product's tile, where that many fit. Columns are counted as `row_buffer` lays them.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    budget = workspace(device) if workspace_bytes is None else workspace_bytes
    rows = max(1, min(K, int(budget // (_columns(V, device) * bytes_per_column))))
    if rows == K:
        return rows
    whole = 128 if kind == "cuda" and rows >= 128 else 16
    return rows // whole * whole or rows


def workspace(device: torch.device, memory: float = float("inf")) -> int:
    """Bytes, when a call names none, on a GPU of so much `memory` if there is none to be asked."""
    if device.type != "cuda":
        return WORKSPACE_BYTES["cpu"]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
    return int(min(WORKSPACE_BYTES["cuda"], memory / 16))


def row_buffer(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, V]. On CUDA every row is aligned, whatever V is: for vector loads and cuBLAS."""
    return torch.empty(rows, _columns(V, device), dtype=dtype, device=device)[:, :V]


def _columns(V: int, device: torch.device) -> int:
    """From one row of a buffer to the next, in elements."""
    unit = ROW_ALIGNMENT.get(device.type, 1)
    return -(-V // unit) * unit


def chunks(K: int, rows: int) -> Iterator[slice]:
    """Slices of `rows` rows that cover K, the last one shorter."""
    for start in range(0, K, rows):
        yield slice(start, min(start + rows, K))


class HeadProducts:
    """The products with one head's weight [V, H], in chunks of rows.

    Hidden states and weight of different dtypes are multiplied in the wider of the two; with `cast_weight` in the
    hidden states', to which the weight is cast once. Its gradient is a sum in `accumulate` either way.
    """

    def __init__(self, weight: Tensor, hidden: Tensor, accumulate: torch.dtype, cast_weight: bool = False) -> None:
        self.weight = weight.to(hidden.dtype) if cast_weight else weight
        self.dtype = torch.promote_types(self.weight.dtype, hidden.dtype)
        self.accumulate = accumulate
        # On CUDA the tensor cores take half-precision operands as they are and accumulate in float32.
        self.native = weight.device.type == "cuda" and self.dtype != accumulate
        self.operand = self.dtype if self.native else accumulate
        self.one_dnn = hidden.dtype == torch.float32 and cpu_product.available(self.weight)

    def room(self, rows: int) -> Tensor | None:
        """For the logits of a chunk of so many rows; None where they come in a tensor of their own."""
        V, device = self.weight.shape[0], self.weight.device
        aligned = _columns(V, device) > V  # as kernels want it that a CPU interprets
        return None if self.one_dnn and not aligned else row_buffer(rows, V, self.accumulate, device)

    def logits(self, hidden: Tensor, room: Tensor | None) -> Tensor:
        """hidden [k, H] weight^T, [k, V], in the first rows of the `room` if there is one."""
        hidden = hidden.to(self.operand)
        if room is None:
            return cpu_product.product(hidden, self.weight)
        out = room[: len(hidden)]
        with _products(self.dtype):
            for columns, block in self._blocks():
                self._mm(hidden, block.T, out[:, columns])
        return out

    def hidden_gradient(self, grad: Tensor, out: Tensor) -> Tensor:
        """out [k, H] = grad [k, V] weight."""
        if self.one_dnn:
            return out.copy_(cpu_product.product(grad, self.weight.t()))
        with _products(self.dtype):
            for columns, block in self._blocks():
                if columns.start == 0:
                    self._mm(grad[:, columns], block, out)
                else:
                    out.addmm_(grad[:, columns], block)
        return out

    def weight_gradient(self, grad: Tensor, hidden: Tensor, total: Tensor, *, first: bool) -> None:
        """total [V, H] = grad [k, V]^T hidden [k, H], added to what `total` holds unless this is the first."""
        hidden = hidden.to(self.operand)
        if self.one_dnn and not cpu_product.mkl_is_as_fast():
            for columns in self._vocabulary_blocks(hidden.shape[1]):
                product = cpu_product.product(grad[:, columns].t(), hidden.t())
                if first:
                    total[columns].copy_(product)
                else:
                    total[columns] += product
            return
        with _products(self.dtype):
            if first:
                self._mm(grad.T, hidden, total)
            elif self.native:
                torch.addmm(total, grad.T, hidden, out_dtype=self.accumulate, out=total)  # float32 `total`: torch 2.10
            else:
                total.addmm_(grad.T, hidden)

    def bias_gradient(self, grad: Tensor, factor: Tensor, total: Tensor) -> None:
        """total [V] += factor [k] grad [k, V], of a half-precision `grad` without a copy in float32.

        There the factor is a sum of three of its numbers, so that only `grad` itself is rounded, in units of the
        largest: float16 begins at 6e-8.
        """
        if not self.native:
            total.addmv_(grad.T, factor)
            return
        unit = factor.abs().amax().clamp(min=torch.finfo(factor.dtype).tiny)
        rest, parts = factor / unit, []
        for _ in range(3):
            parts.append(rest.to(self.operand))
            rest = rest - parts[-1]
        total += torch.mm(torch.stack(parts), grad, out_dtype=self.accumulate).sum(0) * unit

    def _mm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if self.native:
            torch.mm(a, b, out_dtype=self.accumulate, out=out)
        else:
            torch.mm(a, b, out=out)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as an operand: as it is, or widened block by block."""
        V, H = self.weight.shape
        if self.weight.dtype == self.operand:
            yield slice(0, V), self.weight
            return
        for columns in self._vocabulary_blocks(H, _CAST_BYTES):
            yield columns, self.weight[columns].to(self.operand)

    def _vocabulary_blocks(self, width: int, size: int = _BLOCK_BYTES) -> Iterator[slice]:
        """The vocabulary in blocks of which one, `width` wide, has `size` bytes."""
        return chunks(len(self.weight), max(1, size // (width * self.operand.itemsize)))


@contextmanager
def _products(dtype: torch.dtype) -> Iterator[None]:
    """Lets oneDNN multiply float32 tensors of bfloat16 values on bfloat16 units, for the calls inside."""
    settings = torch.backends.mkldnn.matmul
    if dtype != torch.bfloat16 or settings.fp32_precision == "bf16":
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
