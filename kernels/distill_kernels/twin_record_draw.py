"""Recording a step's draw in PyTorch: what `triton_record_draw` does for CUDA, for tensors on a CPU."""

from torch import Tensor

from distill_kernels.types import Sample


def record(
    drawn: Sample,
    step: int | Tensor,
    rows: Tensor,
    ended: Tensor,
    ends: Tensor,
    pad_token_id: int,
    *out: Tensor,
) -> Tensor:
    """See `record_draw`, whose buffers are `out`."""
    token_ids, lengths, logprob, sampling_logprob, finished = out
    go_on = drawn.token_ids.masked_fill(ended, pad_token_id)
    token_ids[rows, step] = go_on
    logprob[rows, step] = drawn.logprob.masked_fill(ended, 0.0)
    sampling_logprob[rows, step] = drawn.sampling_logprob.masked_fill(ended, 0.0)
    lengths[rows] += ~ended
    ended |= (go_on[:, None] == ends).any(1)
    finished[rows] = ended
    return go_on
