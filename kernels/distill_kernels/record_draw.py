"""`record_draw`: what rows drew in a step goes to where their completions stand, and rows end at an end.

For row r, unless it has `ended` before, at which padding and zeros are written and its length stays:

    token_ids[rows[r], step], logprob[..], sampling_logprob[..] = the draw of row r;   lengths[rows[r]] += 1

On CUDA one launch for what is thirty in PyTorch, as a step's draw is small; on a CPU these plain operations, which a
recorded step repeats one by one. Left out on purpose: gradients.
"""

import torch
from torch import Tensor

from distill_kernels import backend, checks, twin_record_draw
from distill_kernels.types import Sample


@torch.library.custom_op(
    "distill_kernels::record_draw",
    mutates_args=("ended", "token_ids", "lengths", "logprob", "sampling_logprob", "finished"),
)
def _record_draw(
    drawn_token_ids: Tensor,
    drawn_logprob: Tensor,
    drawn_sampling_logprob: Tensor,
    step: Tensor,
    rows: Tensor,
    ended: Tensor,
    ends: Tensor,
    pad_token_id: int,
    token_ids: Tensor,
    lengths: Tensor,
    logprob: Tensor,
    sampling_logprob: Tensor,
    finished: Tensor,
) -> Tensor:
    drawn = Sample(drawn_token_ids, drawn_logprob, drawn_sampling_logprob)
    out = token_ids, lengths, logprob, sampling_logprob, finished
    implementation = backend.implementation("record_draw", ended.device)
    return implementation.record(drawn, step, rows, ended, ends, pad_token_id, *out)


@_record_draw.register_fake
def _(drawn_token_ids, *_) -> Tensor:
    return torch.empty_like(drawn_token_ids)


def record_draw(
    drawn: Sample,
    step: int | Tensor,
    rows: Tensor,
    ended: Tensor,
    ends: Tensor,
    pad_token_id: int,
    *,
    token_ids: Tensor,
    lengths: Tensor,
    logprob: Tensor,
    sampling_logprob: Tensor,
    finished: Tensor,
) -> Tensor:
    """Writes the draws of R rows to the buffers of N completions, and marks in place those that one of `ends` ends.

    Row r's place is `rows[r]` ([R] int64, all different) in the contiguous `token_ids` [N, T] int64, `logprob` and
    `sampling_logprob` [N, T] float32 (nats), `lengths` [N] int64 and `finished` [N] bool, which becomes what `ended`
    ([R] bool) becomes. `step` (below T) is a number or an int64 tensor of one element, which a captured graph reads
    anew; `ends` is [E] int64.

    Returns the tokens [R] to go on with: `pad_token_id` for the rows that had ended before.

    Raises ValueError for a wrong shape, layout or device.
    """
    out = {
        "token_ids": token_ids,
        "lengths": lengths,
        "logprob": logprob,
        "sampling_logprob": sampling_logprob,
        "finished": finished,
    }
    for name, tensor in out.items():
        expected = lengths.shape if name in ("lengths", "finished") else token_ids.shape
        if tensor.shape != expected or tensor.device != ended.device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(expected)} on {ended.device}; found {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}, on {tensor.device}"
            )
    for name, vector in {"rows": rows, **drawn._asdict()}.items():
        checks.check_vector(name, vector, ended.shape[0], f"ended {list(ended.shape)}")
    if not backend.runs_triton(ended.device):
        return twin_record_draw.record(drawn, step, rows, ended, ends, pad_token_id, *out.values())
    if not isinstance(step, Tensor):
        step = torch.full((1,), step, dtype=torch.int64, device=ended.device)
    return _record_draw(*drawn, step, rows, ended, ends, pad_token_id, *out.values())
