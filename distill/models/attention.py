"""Which attention a model is computed with: chosen for a device, replaced for a call, and what is installed."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel, masking_utils
from transformers.utils import import_utils

from distill.models.sources import ModelError

ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash-attn", 8, import_utils.is_flash_attn_2_available),
    "flash_attention_3": ("flash_attn_3", 9, import_utils.is_flash_attn_3_available),
    "flash_attention_4": ("flash-attn-4", 9, import_utils.is_flash_attn_4_available),
}


def choose_attention(requested: str, device: torch.device) -> str | None:
    """What a model is loaded with; for `auto` None, with which transformers takes sdpa where the class has it."""
    if requested == "auto":
        return None
    capability = _capability(device)
    if requested in ATTENTION_PACKAGES:
        package, needed, is_available = ATTENTION_PACKAGES[requested]
        if capability < needed:
            raise ModelError(
                f"training.attention: {requested} needs a GPU of compute capability {needed} or higher, "
                f"found {'compute capability ' + str(capability) if capability else 'no GPU'}; use auto or sdpa"
            )
        if not is_available():
            raise ModelError(f"training.attention: {requested} needs the package {package}: pip install {package}")
    return requested


def prefer(model: PreTrainedModel, device: torch.device) -> None:
    """Has a loaded model computed as `auto` means: by the newest FlashAttention that GPU and class support.

    Elsewhere a model with a soft cap goes by eager: sdpa leaves it out, and some versions of transformers take sdpa.
    """
    # FlashAttention 4 is still a beta: it is used when named, not by itself.
    for name in ("flash_attention_3", "flash_attention_2"):
        _, needed, is_available = ATTENTION_PACKAGES[name]
        if model._supports_flash_attn and _capability(device) >= needed and is_available():
            model.set_attn_implementation(name)
            return
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


@contextlib.contextmanager
def attention_as(body: nn.Module, name: str) -> Iterator[None]:
    """Has the model call the attention function that is registered under `name` meanwhile."""
    configs = {id(module.config): module.config for module in body.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, name_before in before:
            config._attn_implementation = name_before


@contextlib.contextmanager
def unpacked_rows() -> Iterator[None]:
    """Has the model take each row for one sequence meanwhile; transformers would read the positions to find that out,
    and wait for the device in every call.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
