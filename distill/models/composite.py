"""Models of text and of pictures or sounds: loaded and saved as what they are; their language model alone is used.

Text passes the language model inside and the head; the other parts are carried along, as they are stored and without
gradients. Left out on purpose: prompts with pictures or sounds in them, and patches per model family: transformers
says which class a configuration is of, and which module decodes.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from distill.models.structure import has_other_parts, text_model

# What turns pictures and sounds into a model's inputs: not read here, but the saved model is of no use without.
PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)


def auto_class(config: Any) -> type:
    """The class of transformers that loads a model of this configuration whole."""
    whole, text = (
        kind._model_mapping.get(type(config), None) for kind in (AutoModelForMultimodalLM, AutoModelForCausalLM)
    )
    if whole is None or config.get_text_config() is config or config.is_encoder_decoder:
        return AutoModelForCausalLM
    # Some configurations are also of a class of the language model alone, and such a checkpoint has no other parts.
    only_text = text is not None and text is not whole and text.__name__ in (config.architectures or ())
    return AutoModelForCausalLM if only_text else AutoModelForMultimodalLM


def other_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The parameters that text does not pass, such as a vision tower's; a plain model has none."""
    if has_other_parts(model):
        used = {id(p) for part in (text_model(model), model.get_output_embeddings()) for p in part.parameters()}
        yield from (parameter for parameter in model.parameters() if id(parameter) not in used)


@torch.no_grad()
def set_other_parts_aside(model: PreTrainedModel, stored: torch.dtype | None) -> None:
    """Freezes what text does not pass, in the dtype in which it is stored, unless that would round it."""
    for parameter in other_parameters(model):
        parameter.requires_grad_(False)
        smaller = stored is not None and stored.itemsize < parameter.itemsize
        if smaller and torch.equal(parameter.to(stored).to(parameter.dtype), parameter):
            parameter.data = parameter.to(stored)


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Writes a model folder that loads again as what `model` was loaded as, its tokenizer aside.

    The `options` are those of `save_pretrained`.
    """
    model.save_pretrained(folder, **options)
    if not has_other_parts(model):
        return
    # transformers names the dtype of whichever part comes first, and loads all others in it.
    model.config.dtype = model.get_output_embeddings().weight.dtype
    model.config.save_pretrained(folder)
    for name in PROCESSOR_FILES:
        found = cached_file(
            model.name_or_path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found:
            shutil.copyfile(found, folder / name)
