"""When `linear_distill_loss` lets one kernel multiply by the student's head and make the logits' gradient, and in what.

That is on Hopper, whose shared memory its tiles are cut for, in bfloat16, for `sampled_reverse_kl` of a head without
bias and softcap; everything else goes through `triton_rows`. float16 is left out: the gradient is kept relative to the
probability of the row's own token, and the reciprocal of a sum in such units passes the range of float16. So is
`reverse_kl`, which needs a second plane and one more pass over both: a step was 3 to 7 % faster for it on an H100, and
12 to 17 % for the sampled objective.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from distill_kernels import backend
from distill_kernels.chunks import ROW_ALIGNMENT, HeadProducts, row_buffer, rows_per_chunk
from distill_kernels.types import OBJECTIVES, Head

STUDENT_PRODUCT = True  # whether it runs where it applies; a benchmark times both ways


def applies(
    student: HeadProducts,
    hidden: Tensor,
    heads: Iterable[Head],
    temperature: float,
    objective: int,
    gradient: bool,
) -> bool:
    """Whether it runs for these arguments."""
    weight = student.weight
    return (
        STUDENT_PRODUCT
        and gradient
        and objective == OBJECTIVES.index("sampled_reverse_kl")
        and _capable(student)
        and all(_is_plain(head, temperature) for head in heads)
        and weight.dtype == hidden.dtype
        and _is_aligned(weight)
        and hidden.shape[1] * hidden.dtype.itemsize % 16 == 0
    )


def rows(K: int, V: int, student: HeadProducts, workspace_bytes: int | None) -> int:
    """Of a chunk, by E and the teacher's logits; partial sums are counted as three columns in a hundred of float32."""
    bytes_per_column = student.operand.itemsize + student.accumulate.itemsize * 1.03
    return rows_per_chunk(K, V, bytes_per_column, workspace_bytes, student.weight.device)


def way(student: HeadProducts, rows: int, V: int) -> Callable[..., Tensor]:
    """What makes the rows of a chunk, of at most `rows`, from hidden states and the teacher's logits, as
    `triton_rows.distill_rows` does from both models' logits. It gives the logits' gradient, which is E in the end."""
    device = student.weight.device
    module = backend.implementation("student_product", device)
    room = module.scratch(rows, V, device)
    weight, e = student.weight.to(student.operand), row_buffer(rows, V, student.operand, device)

    def distill(hidden: Tensor, teacher: Tensor, *, objective: int, beta: float, **options) -> Tensor:
        hidden = hidden.to(student.operand).contiguous()
        hidden = hidden if hidden.data_ptr() % 16 == 0 else hidden.clone()  # as descriptors want it
        grad = e[: len(hidden)]
        module.distill_product(hidden, weight, teacher, room, grad=grad, **options)
        return grad

    return distill


def _is_plain(head: Head, temperature: float) -> bool:
    """No bias, no softcap, and a scale that 1e30, for a column that does not exist, can be divided by."""
    return head.bias is None and head.softcap is None and 1e-6 < abs(head.scale / temperature) < 1e6


def _capable(student: HeadProducts) -> bool:
    """Of this operand, on this device: for tests also a CPU that interprets the kernels and aligns rows for them."""
    device = student.weight.device
    if ROW_ALIGNMENT.get(device.type, 1) % 8:
        return False
    if device.type == "cuda":
        return student.operand == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] == 9
    return backend.interpreting() and student.operand == torch.float32


def _is_aligned(weight: Tensor) -> bool:
    """As the descriptors of tensors in memory want it."""
    bytes_per_row = weight.stride(0) * weight.dtype.itemsize
    return weight.stride(1) == 1 and bytes_per_row % 16 == 0 and weight.data_ptr() % 16 == 0
