"""The end of a model without the rest: its final norm and its head, for hidden states that come from elsewhere.

Read are the files that hold these tensors. Which module is the norm is found by running the model without its layers
and without memory; whether that is all that stands between the layers and the head, the caller finds out.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from distill.models.composite import auto_class
from distill.models.loading import model_folder, readable_errors
from distill.models.sources import ModelError, resolve
from distill.models.structure import Head, body_of, layer_stack, split_head


class ModelEnd(NamedTuple):
    """What follows the last layer of a model."""

    norm: nn.Module  # float32 [.., H] to float32 [.., H]
    head: Head
    num_layers: int


def load_end(reference: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> ModelEnd:
    """The end of a model, its head in `dtype`. Raises `ModelError`."""
    location = model_folder(resolve(reference), trust_remote_code)
    with readable_errors(reference, location):
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        num_layers = config.get_text_config().num_hidden_layers
        names = _names(model)
        norm, output = _final_norm(model), model.get_output_embeddings()
        of_module, files = {module: name for name, module in model.named_modules()}, _files(location)
        for module in (norm, output):
            for name, _ in list(module.named_parameters(recurse=False)):
                found = _read(location, files, names[f"{of_module[module]}.{name}"])
                module._parameters[name] = nn.Parameter(found, requires_grad=False)
    head = split_head(model)[1]
    bias = None if head.bias is None else head.bias.to(device, dtype)
    head = head._replace(weight=head.weight.to(device, dtype), bias=bias)
    return ModelEnd(norm.to(device, torch.float32), head, num_layers)


def _final_norm(model: PreTrainedModel) -> nn.Module:
    """The module of the body that gives its last hidden states; `model` has no layers afterwards."""
    parent, name = layer_stack(model, "teacher.server_gives hidden")
    setattr(parent, name, nn.ModuleList())
    body, called = body_of(model.eval()).to_empty(device="cpu"), []  # pages that nobody touches take no memory
    for module in body.modules():
        module.register_forward_hook(lambda module, _, output: called.append((module, output)))
    found = body(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).last_hidden_state
    own = (module for module, output in called if isinstance(output, Tensor) and output.data_ptr() == found.data_ptr())
    norms = [module for module in own if list(module.parameters(recurse=False))]
    if not norms:
        raise ModelError(f"model type {model.config.model_type!r} has no norm after its last layer that could be found")
    return norms[0]


def _names(model: PreTrainedModel) -> dict[str, list[str]]:
    """Of each parameter's name all names of the parameter: a tied one has several."""
    every, names = list(model.named_parameters(remove_duplicate=False)), defaultdict(list)
    for name, parameter in every:
        names[id(parameter)].append(name)
    return {name: names[id(parameter)] for name, parameter in every}


def _files(location: str) -> dict[str, str]:
    """The file of each tensor of a checkpoint."""
    index = cached_file(location, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index:
        return json.loads(Path(index).read_text())["weight_map"]
    with safe_open(cached_file(location, SAFE_WEIGHTS_NAME), "pt") as file:
        return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)


def _read(location: str, files: dict[str, str], names: list[str]) -> Tensor:
    """The tensor of a checkpoint that has one of the `names`."""
    stored = [name for name in names if name in files] or _alike(names[0], files)
    if not stored:
        raise ModelError(f"its files have no tensor {names[0]}")
    with safe_open(cached_file(location, files[stored[0]]), "pt") as file:
        tensor = file.get_tensor(stored[0])
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"its {stored[0]} is stored as {tensor.dtype}, which is not read here")
    return tensor


def _alike(name: str, stored: dict[str, str]) -> list[str]:
    """What a checkpoint of another order of parts calls a tensor: by its last two names, in no layer's."""
    ending = "." + ".".join(name.split(".")[-2:])
    alike = [other for other in stored if other.endswith(ending) and not any(map(str.isdigit, other.split(".")))]
    return alike if len(alike) == 1 else []
