"""Loading a model and its tokenizer from a reference, with the attention that the device has; errors name the model."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill.models.agreement import find_split
from distill.models.attention import choose_attention, prefer
from distill.models.composite import auto_class, set_other_parts_aside
from distill.models.norms import fuse_norms
from distill.models.quantised import load_quantised, stored_format
from distill.models.sources import ModelError, Source, cache_dir, resolve, sha256_of
from distill.models.states import warn_of_absent_kernels
from distill.models.structure import remove_layers

# For a repository without safetensors, transformers would otherwise ask a service of the hub to convert it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def load_tokenizer(reference: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model reference, padding on the left."""
    location = model_folder(resolve(reference), trust_remote_code)
    with readable_errors(reference, location):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if strange := [name for name in named if not name.replace("_", "").replace("-", "").isalnum()]:
        # Each becomes a file of that name when the trained model is saved.
        raise ModelError(
            f"model {reference!r}: its tokenizer names a chat template {strange[0]!r}, which is no file name"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        # Padding is masked by length everywhere, so any id will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(
    reference: str,
    *,
    drop_layers: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    trust_remote_code: bool = False,
    trained: bool = False,
) -> PreTrainedModel:
    """Loads a causal LM in eval mode; on a GPU its RMS norms are one kernel each.

    One with other parts beside its language model has them frozen, in the dtype in which they are stored.
    `drop_layers` are indices into the layers of the model as it is stored. One that is stored quantised is used so
    where it can be, and dequantised where it is `trained` or pruned. Raises `ModelError`.
    """
    device = torch.device(device)
    location = model_folder(resolve(reference), trust_remote_code)
    # Tensor by tensor to where they stay, so that the host never holds the whole; a CPU is where they are read to.
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    with readable_errors(reference, location):
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)

        def read(**more: Any) -> PreTrainedModel:
            model, info = auto_class(config).from_pretrained(
                location,
                dtype=dtype,
                attn_implementation=choose_attention(attention, device),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # other weights are pickles, which can run code
                ignore_mismatched_sizes=True,  # for `_check_complete`, which names them
                output_loading_info=True,
                **placed,
                **more,
            )
            _check_complete(reference, info)
            return model

        if stored_format(config):
            plain = trained or bool(drop_layers)
            model = load_quantised(reference, config, read, dtype=dtype, device=device, plain=plain)
        else:
            model = read()
    set_other_parts_aside(model, config.dtype)
    remove_layers(model, drop_layers)
    model = model.to(device).eval()
    if attention == "auto":
        prefer(model, device)
    if device.type == "cuda":
        fuse_norms(model)
        warn_of_absent_kernels(model.config)
    find_split(model)
    return model


def _check_complete(reference: str, info: dict[str, Any]) -> None:
    """Refuses a model of which a part was not in its files: transformers would fill it with random numbers."""
    absent = sorted(info["missing_keys"]) + sorted(key[0] for key in info["mismatched_keys"])
    if absent:
        raise ModelError(
            f"model {reference!r}: {len(absent)} of its tensors are missing or have another shape, {absent[0]} among "
            f"them: its weights and its config.json do not belong together"
        )


def model_folder(source: Source, trust_remote_code: bool) -> str:
    """What `from_pretrained` takes; a `.gguf` is converted to a float32 model directory in the cache, once."""
    if source.gguf is None:
        return source.location
    target = cache_dir() / "converted" / sha256_of(source.gguf)[:32]
    if not target.is_dir():
        with readable_errors(source.location):
            target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary, readable_errors(source.location):
            options = {"gguf_file": source.gguf.name, "trust_remote_code": trust_remote_code}
            folder = str(source.gguf.parent)
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **options
            )
            _check_complete(source.location, info)
            # transformers refuses to save what it takes for a quantised model; these weights are plain float32.
            model.hf_quantizer = None
            del model.config.quantization_config
            converted = Path(temporary) / "model"
            model.save_pretrained(converted)
            AutoTokenizer.from_pretrained(folder, **options).save_pretrained(converted)
            # Another process may have finished the same conversion in the meantime: its result is as good.
            with contextlib.suppress(FileExistsError):
                converted.rename(target)
    return str(target)


@contextlib.contextmanager
def readable_errors(reference: str, location: str | None = None):
    """transformers' many ways to fail, as one message that names the model. Its own progress bars are hidden."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except ModelError:
        raise
    # What a damaged file or a foreign model makes the libraries raise is open-ended, down to struct.error.
    except Exception as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "its repository ships Python code; trust_remote_code: true runs it"
        if "no file named model.safetensors" in reason or "cannot be loaded with `safetensors`" in reason:
            reason = "it has no .safetensors weights, and no others are read: convert it with save_pretrained"
        if location is not None and location != reference:
            reason += f" (its files: {location}; without that folder it is made anew)"
        raise ModelError(f"model {reference!r} could not be loaded: {reason[:600]}") from error
