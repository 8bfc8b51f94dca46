"""The copy of a student that generates: eval mode, generation precision, weights laid out for small batches.

The copy has the student's structure and its own configuration, so the student's mode, gradients, attention and
generation settings are never touched. Weights that need no other form are shared with the student; the others are
brought up to date by `refresh`. The head always gives float32 logits.
Weights that are shared out over ranks are gathered into it, one at a time, once for all rollouts of a batch.
Left out on purpose: quantised weights, which would sample from a policy too far from the one that is trained.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from distill.models import (
    Float32Head,
    Lookup,
    PackedLinear,
    WorkingCopy,
    alias,
    fuse_norms,
    is_adapted,
    join_siblings,
    linear_layers,
    merged_weight,
    read_together,
    replace_siblings,
    text_model,
    whole,
)


class GenerationCopy:
    """`model` is the copy; `refresh` brings it up to its source, and `stale` says that this is due."""

    def __init__(
        self,
        source: PreTrainedModel,
        dtype: torch.dtype,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        pack: bool,
        working: WorkingCopy | None = None,
    ) -> None:
        """`pack` lays linear weights out for a CPU, where there is one. What `working` has in `dtype` is not copied."""
        self.model: PreTrainedModel = alias(source).eval()
        # A checkpoint's own generation settings would apply silently.
        self.model.generation_config = GenerationConfig(
            eos_token_id=list(eos_token_ids) or None, pad_token_id=pad_token_id
        )
        self.dtype, self.stale = dtype, False
        self._updates: list[Callable[[], None]] = []
        packs = pack and self.model.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self._replace_head(packs)
        self._replace_embedding()
        layers = [
            self._replace(parent, name, PackedLinear([child], self.dtype) if packs else self._merged(child))
            for parent, name, child in list(linear_layers(text_model(self.model)))
            if packs or is_adapted(child)
        ]
        self._cast_parameters(working.copies if working is not None and working.dtype == dtype else {})
        if packs:
            self._pack(layers)
        fuse_norms(self.model)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the weights that have another form here from the source."""
        for update in self._updates:
            update()
        self.stale = False

    def _replace_head(self, packs: bool) -> None:
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            made = PackedLinear([head], torch.float32) if packs else Float32Head(head)
            self.model.set_output_embeddings(made)
            if packs:
                self._pack([made])

    def _replace_embedding(self) -> None:
        embedding = self.model.get_input_embeddings()
        if type(embedding) is nn.Embedding and embedding.max_norm is None and self.model.device.type == "cuda":
            self.model.set_input_embeddings(Lookup(embedding))

    @staticmethod
    def _replace(parent: nn.Module, name: str, layer: nn.Module) -> nn.Module:
        setattr(parent, name, layer)
        return layer

    def _pack(self, layers: Sequence["PackedLinear"]) -> None:
        """Lays weights out for the CPU; those of layers that read the same input as one."""
        groups = read_together(self.model, layers) if len(layers) > 1 else []
        for group in groups:
            joined = PackedLinear([source for layer in group for source in layer.sources], group[0].dtype)
            replace_siblings(self.model, group, joined)
            layers = [layer for layer in layers if layer not in group] + [joined]
        for layer in layers:
            layer.update()
            if any(parameter.requires_grad for source in layer.sources for parameter in source.parameters()):
                self._updates.append(layer.update)

    @torch.no_grad()
    def _merged(self, adapted: nn.Module) -> nn.Linear:
        linear = copy.copy(adapted.base_layer)
        linear._parameters = dict(linear._parameters)  # the adapted layer still reads its own
        linear.weight = nn.Parameter(merged_weight(adapted).to(self.dtype), requires_grad=False)
        self._updates.append(lambda: linear.weight.copy_(merged_weight(adapted)))
        return linear

    def _cast_parameters(self, kept: dict[int, nn.Parameter]) -> None:
        """`kept`, by the id of a source, is brought up to date by another."""
        copies = dict(kept)
        for module in (*text_model(self.model).modules(), self.model.get_output_embeddings()):
            for name, source in module._parameters.items():
                if source is None or not source.is_floating_point():
                    continue
                if source.dtype == self.dtype and not hasattr(source, "full_tensor"):
                    continue
                if id(source) not in copies:
                    copies[id(source)] = nn.Parameter(whole(source.detach()).to(self.dtype), requires_grad=False)
                    if source.requires_grad:
                        self._updates.append(_copier(source, copies[id(source)]))
                module._parameters[name] = copies[id(source)]
        if self.model.device.type == "cuda":
            join_siblings(self.model, copies.values())


def _copier(source: Tensor, target: Tensor) -> Callable[[], None]:
    return lambda: target.copy_(whole(source))
