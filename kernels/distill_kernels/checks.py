"""Validation of arguments. Everything here reads shapes, dtypes and devices only, so that it costs no GPU
synchronisation and `torch.compile` traces it; the one check of values, `check_token_ids`, runs inside the ops.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from distill_kernels.types import TopTokens

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_check_cuda_values = False


def check_cuda_values(enabled: bool) -> None:
    """Turns the range check of token ids on CUDA on or off (off at the start: it waits for the GPU at every call).

    While it is off, a token id outside the vocabulary gives NaN statistics for its row on CUDA, and no gradient
    of any use; on a CPU it is always an IndexError.
    """
    global _check_cuda_values
    _check_cuda_values = enabled


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raises IndexError for ids outside [0, vocab_size)."""
    if token_ids.numel() == 0 or (token_ids.is_cuda and not _check_cuda_values):
        return
    lowest, highest = token_ids.min().item(), token_ids.max().item()
    if lowest < 0 or highest >= vocab_size:
        raise IndexError(
            f"token_ids must lie in [0, {vocab_size}); found ids from {lowest} to {highest}. "
            "Drop the padding before the call, or pass the vocabulary both models share as vocab_size"
        )


def check_floats(**tensors: Tensor | None) -> None:
    """Each tensor is float32, bfloat16, float16 or (on a CPU) float64, and all are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; found {found}")
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype in _FLOATS:
            continue
        if tensor.dtype == torch.float64 and tensor.device.type == "cpu":
            continue
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16 (float64 on a CPU only); "
            f"found {tensor.dtype} on {tensor.device}"
        )


def check_matrix(name: str, tensor: Tensor, letters: str) -> None:
    """The tensor has two dimensions; `letters` names them in the message."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be [{letters}]; found shape {list(tensor.shape)}")


def check_vector(name: str, tensor: Tensor | None, length: int, like: str) -> None:
    """The tensor is [length], the length that `like` (a named shape) implies."""
    if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != length):
        raise ValueError(f"{name} must be [{length}] to match {like}; found shape {list(tensor.shape)}")


def check_same_rows(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Both matrices have as many rows."""
    if tensor.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} and {other_name} must have as many rows; found shapes {list(tensor.shape)} and {list(other.shape)}"
        )


def check_integers(name: str, tensor: Tensor, device: torch.device) -> None:
    """The tensor is int64 and on the device of the others."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must be int64; found {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"all tensors must be on one device; found {name} on {tensor.device}, the rest on {device}")


def resolve_vocab_size(vocab_size: int | None, student_columns: int, teacher_columns: int) -> int:
    """The number of columns that every softmax runs over; raises ValueError unless both models have them."""
    if vocab_size is None:
        if student_columns != teacher_columns:
            raise ValueError(
                f"student and teacher have {student_columns} and {teacher_columns} vocabulary columns: pass the "
                "number of tokens they share as vocab_size"
            )
        vocab_size = student_columns
    if not 1 <= vocab_size <= min(student_columns, teacher_columns):
        raise ValueError(
            f"vocab_size must lie in [1, {min(student_columns, teacher_columns)}]; found {vocab_size} with "
            f"{student_columns} student and {teacher_columns} teacher columns"
        )
    return vocab_size


def check_positive(name: str, value: float | None) -> None:
    """The number is positive and finite, or None."""
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite; found {value}")


def check_linear(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    token_ids: Tensor,
    vocab_size: int | None,
    *,
    vectors: Mapping[str, Tensor | None],
    numbers: Mapping[str, float | None],
    teacher_scale: float,
) -> int:
    """Checks what the linear ops share, and gives the number of vocabulary columns.

    `student` and `teacher` are hidden states [K, H], weight [V, H] and bias [V] or None; `vectors` are [K], `numbers`
    positive. A teacher that is elsewhere is None three times, and the columns are then the student's.
    """
    sides = {"student": student}
    if teacher[0] is None:
        _check_no_teacher(teacher, numbers["teacher_softcap"], teacher_scale)
    else:
        _check_one_teacher(teacher[1], vectors["teacher_logprob"])
        sides["teacher"] = teacher
    floats = {
        f"{side}_{part}": tensor
        for side, tensors in sides.items()
        for part, tensor in zip(("hidden", "weight", "bias"), tensors, strict=True)
    }
    check_floats(**floats, **vectors)
    for side, (hidden, weight, bias) in sides.items():
        check_matrix(f"{side}_hidden", hidden, "K, H")
        check_matrix(f"{side}_weight", weight, "V, H")
        if hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{side}_hidden and {side}_weight must have the same hidden size; found shapes "
                f"{list(hidden.shape)} and {list(weight.shape)}"
            )
        check_vector(f"{side}_bias", bias, weight.shape[0], f"{side}_weight {list(weight.shape)}")
    if teacher[0] is not None:
        check_same_rows("student_hidden", student[0], "teacher_hidden", teacher[0])
    check_integers("token_ids", token_ids, student[0].device)
    for name, vector in {"token_ids": token_ids, **vectors}.items():
        check_vector(name, vector, student[0].shape[0], f"student_hidden {list(student[0].shape)}")
    for name, number in numbers.items():
        check_positive(name, number)
    return resolve_vocab_size(vocab_size, student[1].shape[0], list(sides.values())[-1][1].shape[0])


def check_top(top: TopTokens, token_ids: Tensor, V: int) -> None:
    """A teacher's likeliest tokens, [K, k] each, k from 1 to V."""
    check_floats(teacher_top_logprob=top.logprob)
    check_integers("teacher_top.token_ids", top.token_ids, token_ids.device)
    for name, tensor in zip(("token_ids", "logprob"), top, strict=True):
        if tensor.dim() != 2 or len(tensor) != len(token_ids) or not 1 <= tensor.shape[1] <= V:
            raise ValueError(
                f"teacher_top.{name} must be [{len(token_ids)}, k], k from 1 to {V}; found {list(tensor.shape)}"
            )
    if top.token_ids.shape != top.logprob.shape or top.logprob.device != token_ids.device:
        raise ValueError(
            f"teacher_top's tensors must be alike and where token_ids are; found {list(top.token_ids.shape)} and "
            f"{list(top.logprob.shape)} on {top.logprob.device}"
        )


def _check_no_teacher(teacher: tuple[Tensor | None, ...], softcap: float | None, scale: float) -> None:
    """Without hidden states nothing else of a teacher's head is given either."""
    if teacher[1] is not None:
        raise ValueError("teacher_hidden and teacher_weight go together: found teacher_weight alone")
    if teacher[2] is not None or softcap is not None or scale != 1:
        raise ValueError("teacher_bias, teacher_softcap and teacher_scale need teacher_hidden and teacher_weight")


def _check_one_teacher(weight: Tensor | None, logprob: Tensor | None) -> None:
    """A teacher with hidden states has a weight, and says nothing beside what it computes."""
    if weight is None:
        raise ValueError("teacher_hidden and teacher_weight go together: found teacher_hidden alone")
    if logprob is not None:
        raise ValueError("teacher_logprob takes the place of teacher_hidden and teacher_weight: pass None for both")
