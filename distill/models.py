"""Loading student and teacher: weights, tokenizer, layer dropping, and what must hold between the two.

A model is used in two pieces, the body (token ids to hidden states) and the head (hidden states to logits), so that
logits exist only inside the fused operations. Left out on purpose: patches per model family; what the generic split
cannot express is refused by `check_pair`.
"""

import contextlib
import copy
import os
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import import_utils

from distill.sources import ModelError, Source, cache_dir, resolve, sha256_of

__all__ = ["Head", "ModelError", "alias", "check_pair", "load_model", "load_tokenizer", "split_head", "without_layers"]

# For a repository without safetensors, transformers would otherwise ask a service of the hub to convert it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash-attn", 8, import_utils.is_flash_attn_2_available),
    "flash_attention_3": ("flash_attn_3", 9, import_utils.is_flash_attn_3_available),
    "flash_attention_4": ("flash-attn-4", 9, import_utils.is_flash_attn_4_available),
}


class Head(NamedTuple):
    """The output layer: `logits = softcap · tanh(scale · (h Wᵀ + b) / softcap)`."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., H] to float32 logits [.., V]."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def split_head(model: PreTrainedModel, vocab_size: int | None = None) -> tuple[nn.Module, Head]:
    """The body, whose `last_hidden_state` follows the final norm, and the head; weights are shared, not copied.

    `vocab_size` leaves out the padded columns past the tokenizer.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"model type {model.config.model_type!r} has no output embeddings, so it is no causal LM")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    bias = getattr(output, "bias", None)
    head = Head(
        output.weight[:vocab_size],
        None if bias is None else bias[:vocab_size],
        getattr(config, "final_logit_softcapping", None),
        scale,
    )
    return model.base_model, head


def load_tokenizer(reference: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model reference, padding on the left."""
    location = _folder(resolve(reference), trust_remote_code)
    with _readable_errors(reference, location):
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
) -> PreTrainedModel:
    """Loads a causal LM in eval mode.

    `drop_layers` are indices into the layers of the model as it is stored. Raises `ModelError`.
    """
    device = torch.device(device)
    location = _folder(resolve(reference), trust_remote_code)
    with _readable_errors(reference, location):
        model, info = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=dtype,
            attn_implementation=choose_attention(attention, device),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # other weights are pickles, which can run code
            ignore_mismatched_sizes=True,  # for `_check_complete`, which names them
            output_loading_info=True,
        )
        _check_complete(reference, info)
    _drop_layers(model, drop_layers)
    return model.to(device).eval()


def _check_complete(reference: str, info: dict[str, Any]) -> None:
    """Refuses a model of which a part was not in its files: transformers would fill it with random numbers."""
    absent = sorted(info["missing_keys"]) + sorted(key[0] for key in info["mismatched_keys"])
    if absent:
        raise ModelError(
            f"model {reference!r}: {len(absent)} of its tensors are missing or have another shape, {absent[0]} among "
            f"them: its weights and its config.json do not belong together"
        )


def choose_attention(requested: str, device: torch.device) -> str:
    """`auto`: the newest FlashAttention that is installed and that the GPU supports, else `sdpa`."""
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if requested == "auto":
        # FlashAttention 4 is still a beta: it is used when named, not by itself.
        for name in ("flash_attention_3", "flash_attention_2"):
            _, needed, is_available = ATTENTION_PACKAGES[name]
            if capability >= needed and is_available():
                return name
        return "sdpa"
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


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: those of the generation configuration and the tokenizer's, sorted."""
    found = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [ids])
    return sorted(found - {None})


def check_pair(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Checks before the first step that student and teacher agree; returns the number V of shared real tokens.

    Raises `ModelError` when an id means different tokens to the two, when they end a completion differently, when a
    head is narrower than the tokenizer, or when body and head do not reproduce a model's own logits. Of a `teacher`
    that is None, which another process has, only the vocabulary is compared.
    """
    own, other = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    vocab_size = min(max(own.values()), max(other.values())) + 1
    own_tokens = {index: token for token, index in own.items() if index < vocab_size}
    other_tokens = {index: token for token, index in other.items() if index < vocab_size}
    differing = [i for i in range(vocab_size) if own_tokens.get(i) != other_tokens.get(i)]
    if differing:
        shown = "; ".join(f"{i}: {own_tokens.get(i)!r} / {other_tokens.get(i)!r}" for i in differing[:3])
        raise ModelError(
            f"student and teacher have different vocabularies: {len(differing)} of {vocab_size} ids stand for "
            f"different tokens ({shown}). Distillation on tokens needs one vocabulary: choose models of one family"
        )
    _check_split("student", student, vocab_size)
    if teacher is None:
        return vocab_size
    ends, teacher_ends = eos_ids(student, student_tokenizer), eos_ids(teacher, teacher_tokenizer)
    if ends != teacher_ends:
        raise ModelError(
            f"student and teacher end a completion differently: the student's end-of-sequence ids are {ends}, the "
            f"teacher's {teacher_ends}. Make eos_token_id in both generation_config.json files the same"
        )
    _check_split("teacher", teacher, vocab_size)
    return vocab_size


@torch.no_grad()
def _check_split(name: str, model: PreTrainedModel, vocab_size: int) -> None:
    body, head = split_head(model)
    if head.weight.shape[0] < vocab_size:
        raise ModelError(f"{name}: the tokenizer has {vocab_size} tokens, the model's head only {head.weight.shape[0]}")
    probe = torch.arange(1, min(9, vocab_size), device=head.weight.device)[None]
    # FlashAttention takes no float32, which the student's weights are.
    mixed = "flash" in model.config._attn_implementation and head.weight.dtype == torch.float32
    dtype = torch.bfloat16 if mixed else head.weight.dtype
    with _eval_mode(model), torch.autocast(head.weight.device.type, dtype, enabled=mixed):
        expected = model(input_ids=probe).logits.float()
        found = head.logits(body(input_ids=probe).last_hidden_state)
    # Two ways through the same arithmetic: what remains is the rounding of one matrix product.
    allowed = 64 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)
    error = (expected - found).abs().max()
    if not expected.isfinite().all():
        raise ModelError(f"{name}: its logits are not finite: its weights are damaged")
    if not error <= allowed:
        raise ModelError(
            f"{name}: body and head of model type {model.config.model_type!r} do not give the model's own logits "
            f"(they differ by {error.item():.3g}), so its head does something this trainer does not know"
        )


@contextlib.contextmanager
def _eval_mode(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def alias(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules and a configuration of its own, and the very tensors of `model`."""
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo=tensors)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; where its rows are shared out over ranks, they are gathered, for which all must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def without_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """`model` without some of its decoder layers, sharing the weights of the others; `model` stays whole."""
    pruned = alias(model)
    _drop_layers(pruned, layers)
    return pruned


def layer_stack(model: PreTrainedModel, key: str) -> tuple[nn.Module, str]:
    """The module that holds the decoder layers, and their list's name there. `key` wants it; raises `ModelError`."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise ModelError(f"{key}: model type {model.config.model_type!r} has no single stack of layers")
    return stacks[0]


def _drop_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Removes decoder layers in place and renumbers the rest, so that caches and configuration stay right."""
    dropped = sorted(set(layers))
    if not dropped:
        return
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    if dropped[0] < 0 or dropped[-1] >= count or len(dropped) >= count:
        raise ModelError(f"student.drop_layers: {dropped} does not fit a model of {count} layers (0 to {count - 1})")
    parent, name = layer_stack(model, "student.drop_layers")
    kept = [i for i in range(count) if i not in dropped]
    layers = nn.ModuleList(getattr(parent, name)[i] for i in kept)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(parent, name, layers)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def _folder(source: Source, trust_remote_code: bool) -> str:
    """What `from_pretrained` takes; a `.gguf` is converted to a float32 model directory in the cache, once."""
    if source.gguf is None:
        return source.location
    target = cache_dir() / "converted" / sha256_of(source.gguf)[:32]
    if not target.is_dir():
        with _readable_errors(source.location):
            target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary, _readable_errors(source.location):
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
def _readable_errors(reference: str, location: str | None = None):
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
