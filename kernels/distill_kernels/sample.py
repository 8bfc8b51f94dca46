"""`sample`: draws a token a row from temperature, top-k, top-p and min-p, without a sort over the vocabulary.

With z = logits / temperature, each filter keeps the columns at or above a threshold of z:

    top-k   the k-th largest z                                 (ties of the k-th stay)
    top-p   the smallest z(v) for which the mass of {u: z(u) > z(v)} is below p, among what top-k left
    min-p   max z + log(min_p)

On CUDA a threshold is found by bisection (each step one pass that takes the row's count or mass above a value and
moves to the nearest value that occurs), on a CPU among the largest values of the row. Top-p differs from sorting by
the rounding of a sum at the boundary, and keeps all of a tie there.

The token is the winner of an exponential race over the columns that are kept:

    token = argmax over v of p(v) / E(v),        E(v) = -log(1 - u(v)) standard exponentials

E(v) / p(v) are arrival times at rates p(v), and v is first with probability p(v) (in logarithms it is the Gumbel-max
trick: Gumbel 1954; Maddison, Tarlow and Minka 2014). Logits that differ by rounding, of another program or precision,
draw another token only where two scores nearly tie: among couplings of two distributions it disagrees at most twice
as often as it must. u(v) is fixed by (seed, step, row id, v), see `counter`. It has steps of 2^-31 from 2^-32 on: a
column of probability 1e-9 is drawn as often as it should be to a hundredth, and half as often at 1e-10.

Bytes: on CUDA R V w without filters, in one pass over tiles of columns, and 20 a tile for what merges them; the passes
of a bisection, and then the race, re-read the row, which the L2 cache holds.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distill_kernels import backend, checks
from distill_kernels.types import Sample


@torch.library.custom_op("distill_kernels::sample", mutates_args=())
def _sample(
    logits: Tensor,
    row_ids: Tensor,
    step: Tensor,
    seed: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    """Token ids [R] int64 and log-probabilities [2, R] float32."""
    outputs = torch.empty_like(row_ids), logits.new_empty((2, logits.shape[0]), dtype=torch.float32)
    _repeated(outputs, logits, row_ids, step, seed, temperature, top_k, top_p, min_p)()
    return outputs


def _repeated(outputs, logits, row_ids, step, seed, temperature, top_k, top_p, min_p) -> Callable[[], None]:
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    implementation = backend.implementation("sample", logits.device)
    return partial(implementation.sample_rows, logits, row_ids, step, seed, *outputs, **options)


backend.REPEATED["distill_kernels::sample"] = _repeated


@_sample.register_fake
def _(logits, row_ids, *_) -> tuple[Tensor, Tensor]:
    return torch.empty_like(row_ids), logits.new_empty((2, logits.shape[0]), dtype=torch.float32)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    step: int | Tensor,
    row_ids: Tensor | None = None,
) -> Sample:
    """Draws one token a row of logits [R, V] (float32, bfloat16 or float16, float64 on a CPU; any strides).

    `top_k` 0, `top_p` 1 and `min_p` 0 are off. The random numbers of a row are fixed by `seed` (0 to 2**63 - 1),
    `step` (the token's position) and its entry of `row_ids` ([R] int64, 0 to R - 1 if absent). Seed and step are
    numbers, or int64 tensors of one element on the logits' device, which a captured graph reads anew.

    Raises ValueError for a wrong shape, dtype, device or number.
    """
    checks.check_floats(logits=logits)
    checks.check_matrix("logits", logits, "R, V")
    R, V = logits.shape
    if V == 0:
        raise ValueError(f"logits must have at least one column; found shape {list(logits.shape)}")
    checks.check_positive("temperature", temperature)
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive; found {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; found {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must lie in [0, 1]; found {min_p}")
    if not isinstance(seed, Tensor) and not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2**63); found {seed}")
    if row_ids is None:
        row_ids = torch.arange(R, device=logits.device)
    checks.check_vector("row_ids", row_ids, R, f"logits {list(logits.shape)}")
    checks.check_integers("row_ids", row_ids, logits.device)
    step, seed = (_number(name, value, logits.device) for name, value in (("step", step), ("seed", seed)))
    token_ids, logprobs = _sample(logits.detach(), row_ids, step, seed, temperature, top_k, top_p, min_p)
    return Sample(token_ids, logprobs[0], logprobs[1])


def _number(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """The number as an int64 tensor of one element on the device."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.int64, device=device)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element; found shape {list(value.shape)}")
    checks.check_integers(name, value, device)
    return value
