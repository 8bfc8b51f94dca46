"""Which local engine samples from a model, and in which precision: what is decided once, before the first rollout."""

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models import attention_as, compile_layers, fits_capture, linear_layers, native_refusal, windowed_layers
from distill.rollout.decode import decode_step
from distill.rollout.engine import RolloutEngine
from distill.rollout.generation_copy import PackedLinear
from distill.rollout.kv_cache import ATTENTION_NAME, DecodeCache, Room
from distill.rollout.native import NativeEngine
from distill.rollout.prefill import prefill
from distill.rollout.stock import StockEngine
from distill.runtime import is_out_of_memory
from distill_kernels.recording import Watch, capture

# A bfloat16 that is barely faster is not worth its rounding, and a choice this wide is the same in every run.
WORTHWHILE_SPEEDUP = 1.25


def local_engine(
    model: PreTrainedModel,
    *,
    engine: str = "auto",
    precision: str = "auto",
    memory_budget_bytes: int | None = None,
    compiled: bool = False,
    **options: Any,
) -> RolloutEngine:
    """An engine in this process; `precision` is `auto`, `float32` or `bfloat16`.

    `engine` is `native`, `transformers`, or `auto`: the first that can, and the engine's `fallback` says why not the
    first. `compiled` has the native engine compile its layers. The other arguments are those of `NativeEngine`. Raises
    `NotImplementedError` where the native engine is asked for and cannot, `ModelError` where no engine can.
    """
    dtype = choose_dtype(model, precision)
    fallback = None
    if engine != "transformers":
        try:
            return _native(model, compiled, dtype=dtype, memory_budget_bytes=memory_budget_bytes, **options)
        # What a model makes of a cache that it does not know is open-ended.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            known = isinstance(error, NotImplementedError)
            fallback = str(error) if known else f"its probe ends in {type(error).__name__}: {error!s:.200}"
            if engine == "native":
                raise NotImplementedError(f"rollout.engine native: {fallback}; set rollout.engine: auto") from error
    made = StockEngine(model, dtype=dtype, **options)
    # Half precision would hide in its rounding what padding changes; in the weights' own dtype nothing is copied.
    exact = dtype if "flash" in model.config._attn_implementation else model.get_output_embeddings().weight.dtype
    made.one_length = (made if exact == dtype else StockEngine(model, dtype=exact, **options)).sees_padding()
    made.fallback = fallback
    return made


def _native(model: PreTrainedModel, compiled: bool, **options: Any) -> NativeEngine:
    """Raises `NotImplementedError`, or whatever such a model ends in."""
    if reason := native_refusal(model):
        raise NotImplementedError(reason)
    made = NativeEngine(model, **options)
    made.repeats = check_decode_step(made.body, options["dtype"])
    if compiled:
        compile_layers(made.body)
    return made


@torch.no_grad()
def check_decode_step(body: nn.Module, dtype: torch.dtype) -> bool:
    """Compares decode steps with the body's own forward; returns whether steps may be captured and repeated.

    Raises `NotImplementedError` where steps that run as they are disagree.
    """
    P, steps = 3, 3
    token_ids = torch.arange(P + 2 * steps, device=body.device)
    rows = torch.cat([token_ids[:P].expand(2, P), token_ids[P:].view(2, steps)], 1)
    expected = body(input_ids=rows, use_cache=False).last_hidden_state[:, P:]
    prompt, _ = prefill(body, rows[:1, :P], torch.ones_like(rows[:1, :P], dtype=torch.bool))
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-3

    def error(repeat: bool) -> float:
        cache = DecodeCache(prompt, Room(1, P, 2, steps))
        cache.load(prompt, rows.new_zeros(2))
        with seen if not repeat else contextlib.nullcontext():
            found = _decoded(body, cache, P, rows[:, P:], repeat)
        # Too short a step to fall out of a window: the layers have to tell of it.
        if windowed_layers(body.config.get_text_config()) - cache.windows:
            raise NotImplementedError("layers have windows in their mask alone")
        return float((found - expected).abs().max() / expected.abs().max())

    seen = Watch()
    if not (found := error(False)) < tolerance:
        raise NotImplementedError(
            f"a decode step is off by {found:.1e} from the model's own forward, so its layers are of another kind"
        )
    if seen.reason is not None or not fits_capture(body):
        return False
    try:
        return error(True) < tolerance
    # What a model does in a step that is captured is as open-ended as what it makes of a cache.
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        return False


def _decoded(body: nn.Module, cache: DecodeCache, P: int, token_ids: Tensor, repeat: bool) -> Tensor:
    """Hidden states [R, steps, H] after each of token_ids [R, steps], which continue prompts of P tokens."""
    R, steps = token_ids.shape
    fed, first = token_ids[:, 0].clone(), token_ids.new_full((R,), P)
    found: list[Tensor] = []

    def step() -> None:
        hidden = decode_step(body, cache, fed, first + cache.position)
        cache.position.add_(1)
        if not found:
            found.append(hidden.clone())
        found[0].copy_(hidden)

    seen = []
    with attention_as(body, ATTENTION_NAME):
        for number in range(steps):
            fed.copy_(token_ids[:, number])
            if number == 1 and repeat:
                step = capture(step, body.device)
            else:
                step()
            cache.length += 1
            seen.append(found[0].clone())
    return torch.stack(seen, 1)


def choose_dtype(model: PreTrainedModel, precision: str) -> torch.dtype:
    """`float32`, `bfloat16`, or for `auto` bfloat16 where it pays: on GPUs that have it, on a CPU by measuring.

    The measurement multiplies 16 rows by some tens of megabytes of the model's own packed weights.
    """
    if precision != "auto":
        return getattr(torch, precision)
    if model.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if not torch.backends.mkldnn.is_available():
        return torch.float32
    linears, taken = [], 0
    for _, _, linear in linear_layers(model):
        if taken < 2**24:  # elements: past every cache level
            linears.append(linear)
            taken += linear.weight.numel()
    seconds = {dtype: _decode_seconds(linears, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if seconds[torch.float32] > WORTHWHILE_SPEEDUP * seconds[torch.bfloat16] else torch.float32


@torch.no_grad()
def _decode_seconds(linears: list[nn.Module], dtype: torch.dtype) -> float:
    layers = [(PackedLinear([linear], dtype), torch.ones(16, linear.in_features, dtype=dtype)) for linear in linears]
    for layer, _ in layers:
        layer.update()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for layer, inputs in layers:
            layer(inputs)
        best = min(best, time.perf_counter() - start)
    return best
