"""Models that are stored quantised (fp8, MXFP4, GPTQ, ...): used as they are where that works, else as plain weights.

transformers reads the formats, and says which package or GPU one needs; nothing here knows a format by its name. What
is tried: the model as it is stored, which has to compute a few tokens; then its weights dequantised, which take more
memory. Weights that are trained are always dequantised, and so is on a CPU whatever is dequantised while it is read.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from distill.models.sources import ModelError


def stored_format(config: Any) -> str | None:
    """What transformers calls the format of quantised weights; None for a model of plain ones."""
    settings = _settings(config)
    return settings and str(settings.get("quant_method") or "bitsandbytes")  # whose older files do not say


def load_quantised(
    reference: str,
    config: Any,
    read: Callable[..., PreTrainedModel],
    *,
    dtype: torch.dtype,
    device: torch.device,
    plain: bool,
) -> PreTrainedModel:
    """The model of a quantised checkpoint; `read` takes arguments of `from_pretrained`. Raises `ModelError`.

    `plain` asks for weights of `dtype`, as those that are trained must be; else one is warned where they had to be.
    """
    name, while_reading, failures = stored_format(config), {}, []

    def as_stored() -> PreTrainedModel:
        model = read()
        return _usable(model) if _is_quantised(model) else _plain(model, dtype)

    def dequantised() -> PreTrainedModel:
        return _plain(read(**while_reading), dtype)

    attempts = []
    try:
        while_reading = _dequantising(config)
        attempts = [dequantised] if plain or (device.type == "cpu" and while_reading) else [as_stored, dequantised]
    except (ImportError, ValueError) as error:
        failures.append(error)
    for attempt in attempts:
        try:
            model = attempt()
        except ModelError:
            raise
        except Exception as error:  # a package, a GPU, a kernel: what a format may lack is open-ended
            failures.append(error)
            continue
        if not plain and not _is_quantised(model):
            size = sum(parameter.nbytes for parameter in model.parameters())
            warnings.warn(
                f"model {reference!r}: its weights are stored as {name}, which is not computed with here: dequantised "
                f"to {str(model.dtype).removeprefix('torch.')} they take {size / 2**30:.2f} GiB",
                stacklevel=3,
            )
        return model
    reason = " ".join(str(failures[0]).split()).rstrip(".")
    raise ModelError(
        f"model {reference!r}: its weights are stored as {name}, which cannot be used here: {reason[:300]}. Install "
        f"what that asks for, or name a checkpoint of plain weights, such as the one that this was made from"
    )


def _settings(config: Any) -> dict[str, Any] | None:
    for each in (config, config.get_text_config()):
        if settings := getattr(each, "quantization_config", None):
            return settings if isinstance(settings, dict) else settings.to_dict()
    return None


def _dequantising(config: Any) -> dict[str, Any]:
    """What to add to `from_pretrained` so that weights are dequantised while read; nothing where a format cannot be.

    Raises ValueError for a format that transformers does not know, and would read as if its weights were plain.
    """
    settings = _settings(config)
    if not AutoHfQuantizer.supports_quant_method(settings):
        raise ValueError(f"transformers {transformers.__version__} does not know this format")
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(stored_format(config))
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        return {}
    return {"quantization_config": kind.from_dict(settings | {"dequantize": True})}


def _is_quantised(model: PreTrainedModel) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


@torch.no_grad()
def _usable(model: PreTrainedModel) -> PreTrainedModel:
    """A quantised model that computes here, its output layer plain: losses and samplers multiply by that themselves."""
    output = model.get_output_embeddings()
    _replace_wrapped(output, model.dtype)
    if not (output.weight.is_floating_point() and output.weight.itemsize > 1):
        raise ValueError(f"its output layer is quantised too, to {output.weight.dtype}")
    model.eval()(input_ids=torch.arange(1, 9, device=output.weight.device)[None])
    return model


@torch.no_grad()
def _plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` with plain weights of one dtype, that says so and is saved like any other."""
    if any(map(is_traceable_wrapper_subclass, model.parameters())):
        _replace_wrapped(model, dtype)
    elif _is_quantised(model):
        model.dequantize(dtype=dtype)
    kept = () if dtype == torch.float32 else model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():  # what was not quantised has the dtype that it is stored in
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.to(dtype)
    for each in (model.config, model.config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    # How each tensor was dequantised, which saving would undo.
    vars(model).pop("_weight_conversions", None)
    model.hf_quantizer, model.is_quantized = None, False
    return model.requires_grad_(True)


def _replace_wrapped(parent: nn.Module, dtype: torch.dtype) -> None:
    """Has parameters that are quantised by a tensor subclass of their own be plain, in place."""
    for module in parent.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_traceable_wrapper_subclass(parameter):
                module._parameters[name] = nn.Parameter(parameter.dequantize().to(dtype), requires_grad=False)
