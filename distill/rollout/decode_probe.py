"""Whether a decode step means what a model's own forward means, and whether it may be repeated: found by trying."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill.models import attention_as, fits_capture, windowed_layers
from distill.rollout.decode import decode_step
from distill.rollout.kv_cache import ATTENTION_NAME, DecodeCache, Room
from distill.rollout.prefill import prefill
from distill.runtime import is_out_of_memory
from distill_kernels.recording import Watch, capture

# A body, a cache, token ids [R] and their positions [R] to the hidden states [R, H] that predict the next.
Step = Callable[[nn.Module, DecodeCache, Tensor, Tensor], Tensor]
PROMPT, STEPS, ROWS = 3, 3, 2
# Of the largest element of the hidden states that are compared.
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.1
# The vocabulary's parts whose first tokens are tried: models make much of special tokens, which come first, and more of
# their rounding. A step of another kind is off for all tokens.
PARTS = 3
# A position past those that any model was trained on.
FAR = 2**20


@torch.no_grad()
def check_decode(body: nn.Module, step: Step = decode_step) -> None:
    """Raises `NotImplementedError` where decode steps disagree with the body's own forward."""
    errors = []
    for part in range(PARTS):
        rows = _probe_rows(body, part)
        expected = body(input_ids=rows, use_cache=False).last_hidden_state[:, PROMPT:]
        errors.append(_distance(_decoded(body, rows, step), expected))
        if errors[-1] < _tolerance(expected):
            if step is not decode_step:
                _check_far_on(body, rows, step)
            return
    raise NotImplementedError(
        f"a decode step is off by {min(errors):.1e} from the model's own forward, so its layers are of another kind"
    )


def _check_far_on(body: nn.Module, rows: Tensor, step: Step) -> None:
    """Against a step of the model's own layers, as if its tokens stood where no training text ended."""
    expected = _decoded(body, rows, decode_step, first=FAR)
    if (error := _distance(_decoded(body, rows, step, first=FAR), expected)) >= _tolerance(expected):
        raise NotImplementedError(f"far on, a decode step is off by {error:.1e} from that of the model's own layers")


@torch.no_grad()
def can_repeat(body: nn.Module, step: Step = decode_step) -> bool:
    """Whether steps that are captured and repeated say what they say run as they are."""
    rows, seen = _probe_rows(body, 0), Watch()
    expected = _decoded(body, rows, step, watch=seen)
    if seen.reason is not None or not fits_capture(body):
        return False
    try:
        return _distance(_decoded(body, rows, step, repeat=True), expected) < _tolerance(expected)
    # What a model does in a step that is captured is as open-ended as what it makes of a cache.
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        return False


def _probe_rows(body: nn.Module, part: int) -> Tensor:
    """Token ids [R, P + steps]: one prompt, continued in two ways."""
    vocab_size = body.get_input_embeddings().weight.shape[0]
    numbers = torch.arange(PROMPT + ROWS * STEPS, device=body.device)
    token_ids = (numbers + part * (vocab_size // PARTS)) % vocab_size
    return torch.cat([token_ids[:PROMPT].expand(ROWS, PROMPT), token_ids[PROMPT:].view(ROWS, STEPS)], 1)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _tolerance(expected: Tensor) -> float:
    return TOLERANCE if expected.dtype == torch.float32 else ROUNDED_TOLERANCE


def _decoded(
    body: nn.Module,
    rows: Tensor,
    decode: Step,
    *,
    first: int = PROMPT,
    watch: Watch | None = None,
    repeat: bool = False,
) -> Tensor:
    """Hidden states [R, steps, H] of rows [R, P + steps] after their prompt, by decode steps from position `first`."""
    prompt, _ = prefill(body, rows[:1, :PROMPT], torch.ones_like(rows[:1, :PROMPT], dtype=torch.bool))
    cache = DecodeCache(prompt, Room(1, PROMPT, ROWS, STEPS))
    cache.load(prompt, rows.new_zeros(ROWS))
    fed, positions = rows[:, PROMPT].clone(), rows.new_full((ROWS,), first)
    found: list[Tensor] = []

    def step() -> None:
        hidden = decode(body, cache, fed, positions + cache.position)
        cache.position.add_(1)
        if not found:
            found.append(hidden.clone())
        found[0].copy_(hidden)

    seen = []
    with attention_as(body, ATTENTION_NAME), watch or contextlib.nullcontext():
        for number in range(STEPS):
            fed.copy_(rows[:, PROMPT + number])
            if number == 1 and repeat:
                step = capture(step, body.device)
            else:
                step()
            cache.length += 1
            seen.append(found[0].clone())
    # Too short a step to fall out of a window: the layers have to tell of it.
    if windowed_layers(body.config.get_text_config()) - cache.windows:
        raise NotImplementedError("layers have windows in their mask alone")
    return torch.stack(seen, 1)
