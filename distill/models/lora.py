"""Low-rank adapters (LoRA, Hu et al. 2021) by peft: put into a student, merged into a plain copy, saved on their own.

An adapted layer computes `x Wᵀ + scaling · x Aᵀ Bᵀ`; only A and B are trained. The student stays a transformers model,
so nothing that calls it has to know. Left out on purpose: dropout, which would make a log-probability a matter of
chance, and adapters on the output layer, whose plain weight the fused loss multiplies by.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.config import LoraConfig
from distill.models.composite import auto_class
from distill.models.sources import ModelError
from distill.models.structure import alias, text_model, whole

ADAPTER = "default"  # peft's name for the only adapter of a model

README = """A LoRA adapter of `{reference}` for peft; the folder `final` beside it holds the model with it merged.

```python
{base}
model = PeftModel.from_pretrained(base, "{folder}")
```
{note}"""
PLAIN_BASE = """from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{location}")"""
PRUNED_BASE = """from distill.models import load_model
from peft import PeftModel

base = load_model("{reference}", drop_layers={dropped})"""


def add_adapters(model: PreTrainedModel, options: LoraConfig, seed: int) -> None:
    """Puts adapters into `model` and freezes the rest; at first they change nothing, as B is 0. Raises `ModelError`."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"student.lora needs the package peft ({error}): pip install 'distill-on-policy[lora]'"
        ) from None
    names = options.target_modules
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or 2 * options.rank,
        target_modules=names[0] if names == ("all-linear",) else list(names),
        exclude_modules=_outside_language(model),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ModelError(f"student.lora.target_modules: {' '.join(str(error).split())[:400]}") from error
    for name, module in model.named_modules():
        if is_adapted(module) and (type(module.base_layer) is not nn.Linear or module is model.get_output_embeddings()):
            raise ModelError(
                f"student.lora.target_modules: {name!r} is the output layer or no plain linear layer, and an adapter "
                f"there would be missing from the loss: leave it out, or train all weights without student.lora"
            )
    model.eval()


def _outside_language(model: PreTrainedModel) -> str | None:
    """The modules that text does not pass, as a pattern of their names; None where it passes them all."""
    inside = text_model(model)
    name = next(name for name, module in model.named_modules() if module is inside)
    return rf"(?!{re.escape(name)}\.).*" if name else None


def is_adapted(module: nn.Module) -> bool:
    """Whether a layer is one that `add_adapters` has put in the place of another."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def describe(model: PreTrainedModel) -> str:
    """How much of `model` is trained, as a line to print."""
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad == trained) for trained in (True, False)]
    return f"LoRA: {counts[0]:,} parameters are trained, {counts[0] / counts[1]:.2%} of the student's {counts[1]:,}"


def merged_weight(linear: nn.Module) -> Tensor:
    """The weight that a linear layer multiplies by, its adapter added."""
    if not is_adapted(linear):
        return whole(linear.weight.detach())
    layers = linear.base_layer, linear.lora_B[ADAPTER], linear.lora_A[ADAPTER]
    return torch.addmm(*(whole(layer.weight.detach()) for layer in layers), alpha=linear.scaling[ADAPTER])


def linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each linear layer as its parent, its name there, and itself; one with an adapter counts as one."""
    for name, child in list(model.named_children()):
        if type(child) is nn.Linear or is_adapted(child):
            yield model, name, child
        else:
            yield from linear_layers(child)


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """`model` without adapters: their layers as plain ones of the merged weight, all other weights shared."""
    plain = alias(model)
    for parent, name, child in linear_layers(plain):
        if is_adapted(child):
            child.base_layer.weight = nn.Parameter(merged_weight(child), requires_grad=False)
            setattr(parent, name, child.base_layer)
    return plain


def save_adapter(model: PreTrainedModel, folder: Path, reference: str, dropped: Sequence[int]) -> None:
    """Writes what peft loads, with a README that says onto which base: `reference` without the `dropped` layers."""
    folder.mkdir(parents=True)
    config = model.peft_config[ADAPTER]
    config.inference_mode = True
    config.save_pretrained(folder)
    trained = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.detach().contiguous().cpu()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }
    save_file(trained, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    pruned = f"\nThe base is `{reference}` without its layers {list(dropped)}, counted from 0.\n"
    text = README.format(
        reference=reference,
        folder=folder.with_name("adapter"),
        base=(PRUNED_BASE if dropped else PLAIN_BASE).format(
            reference=reference,
            location=model.name_or_path,
            dropped=list(dropped),
            auto_class=auto_class(model.config).__name__,
        ),
        note=pruned if dropped else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
