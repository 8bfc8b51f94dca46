"""Recording a step's draw in Triton, a lane a row: what `twin_record_draw` does for a CPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_math import FUSION
from distill_kernels.types import Sample

BLOCK = 128  # rows of a program
WARPS = 4

POINTERS = (
    "drawn_token_ids", "drawn_logprob", "drawn_sampling_logprob", "step_ptr", "rows", "ended", "ends", "token_ids",
    "lengths", "logprob", "sampling_logprob", "finished", "go_on",
)  # fmt: skip


# Nothing of it is of use to the compiler, and it compiles anew each time that rows are dropped.
@triton.jit(do_not_specialize=["R", "E", "T", "pad_token_id"], do_not_specialize_on_alignment=POINTERS)
def _record_kernel(
    drawn_token_ids, drawn_logprob, drawn_sampling_logprob, step_ptr, rows, ended, ends, token_ids, lengths, logprob,
    sampling_logprob, finished, go_on, R, E, T, pad_token_id, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = r < R
    over = tl.load(ended + r, mask=there, other=1) != 0
    place = tl.load(rows + r, mask=there, other=0)
    at = place * T + tl.load(step_ptr)
    token = tl.where(over, pad_token_id, tl.load(drawn_token_ids + r, mask=there, other=0))
    tl.store(go_on + r, token, mask=there)
    tl.store(token_ids + at, token, mask=there)
    tl.store(logprob + at, tl.where(over, 0.0, tl.load(drawn_logprob + r, mask=there, other=0.0)), mask=there)
    sampled = tl.load(drawn_sampling_logprob + r, mask=there, other=0.0)
    tl.store(sampling_logprob + at, tl.where(over, 0.0, sampled), mask=there)
    length = tl.load(lengths + place, mask=there, other=0)
    tl.store(lengths + place, length + tl.where(over, 0, 1), mask=there)
    for end in range(E):
        over = over | (token == tl.load(ends + end))
    tl.store(ended + r, over, mask=there)
    tl.store(finished + place, over, mask=there)


def record(
    drawn: Sample,
    step: Tensor,
    rows: Tensor,
    ended: Tensor,
    ends: Tensor,
    pad_token_id: int,
    *out: Tensor,
) -> Tensor:
    """See `record_draw`, whose buffers are `out`."""
    R, go_on = ended.shape[0], torch.empty_like(drawn.token_ids)
    if R > 0:
        given = *(vector.contiguous() for vector in drawn), step, rows.contiguous(), ended, ends.contiguous()
        numbers = R, ends.shape[0], out[0].shape[1], pad_token_id
        _record_kernel[(triton.cdiv(R, BLOCK),)](*given, *out, go_on, *numbers, BLOCK=BLOCK, num_warps=WARPS, **FUSION)
    return go_on
