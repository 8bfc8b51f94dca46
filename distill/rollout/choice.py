"""Which local engine samples from a model, and in which precision: what is decided once, before the first rollout."""

import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.models import PackedLinear, compile_layers, linear_layers, native_refusal, split_head
from distill.rollout.decode import decode_step
from distill.rollout.decode_probe import Step, can_repeat, check_decode
from distill.rollout.engine import RolloutEngine
from distill.rollout.generation_copy import GenerationCopy
from distill.rollout.native import NativeEngine
from distill.rollout.plain_step import plain_step
from distill.rollout.stock import StockEngine
from distill.runtime import is_out_of_memory

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
    made, exact = StockEngine(model, dtype=dtype, **options), probed_dtype(model, dtype)
    made.one_length = (made if exact == dtype else StockEngine(model, dtype=exact, **options)).sees_padding()
    made.fallback = fallback
    return made


def _native(model: PreTrainedModel, compiled: bool, **options: Any) -> NativeEngine:
    """Raises `NotImplementedError`, or whatever such a model ends in."""
    if reason := native_refusal(model):
        raise NotImplementedError(reason)
    made = NativeEngine(model, **options)
    _probe(model, made, options["dtype"])
    # In float32 no card has timed them.
    half = model.device.type == "cuda" and options["dtype"] != torch.float32
    if half and _takes_plain_steps(model, made, options["dtype"]):
        made.step, made.repeats = plain_step, True
        return made
    made.repeats = can_repeat(made.body)
    if compiled:
        compile_layers(made.body)
    return made


def _takes_plain_steps(model: PreTrainedModel, made: NativeEngine, dtype: torch.dtype) -> bool:
    try:
        _probe(model, made, dtype, plain_step)
        return can_repeat(made.body, plain_step)
    # Layers of another kind, or a card that has no room for a kernel: the model's own layers do it then.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False


def _probe(model: PreTrainedModel, made: NativeEngine, dtype: torch.dtype, step: Step = decode_step) -> None:
    exact = probed_dtype(model, dtype)
    if exact != dtype:
        try:
            probed = GenerationCopy(model, exact, eos_token_ids=(), pad_token_id=0, pack=False)
            check_decode(split_head(probed.model)[0], step)
        except NotImplementedError:
            raise
        # What a kernel or the memory does not allow in this precision says nothing about the one that is sampled in.
        except Exception:
            pass
        else:
            return
    check_decode(made.body, step)


def probed_dtype(model: PreTrainedModel, dtype: torch.dtype) -> torch.dtype:
    """What a model that samples in `dtype` is probed in: that of its weights, where none has to be gathered for it.

    Half precision hides in its rounding what a probe looks for, and looks like it: a student that lacks layers may make
    its own bfloat16 twice as far off as its hidden states are large.
    """
    weight = model.get_output_embeddings().weight
    needs_half = "flash" in model.config._attn_implementation
    return dtype if needs_half or hasattr(weight, "full_tensor") else weight.dtype


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
