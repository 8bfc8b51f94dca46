"""The body of a model that does more between its base and its output layer: all of it, up to what that layer is given.

A scale of the hidden states, a projection, a transformation of its own: whatever a class does there is done by the
class itself. Which models need it is found by their own logits, so there is no list of families.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class HeadInputs(nn.Module):
    """`last_hidden_state` is what the output layer of `model` is given; nothing is multiplied by its weight."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._supports_attention_backend = model._supports_attention_backend

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        self.model.set_input_embeddings(embedding)

    def forward(self, **inputs: Any) -> BaseModelOutput:
        output, given = self.model.get_output_embeddings(), []

        def catch(hidden: Tensor) -> Tensor:
            given.append(hidden)
            return hidden[..., :1]  # for what the class does to logits

        output.forward = catch
        try:
            self.model(**inputs)
        finally:
            del output.forward
        return BaseModelOutput(last_hidden_state=given[-1])


@torch.no_grad()
def differs_from_own_logits(body: nn.Module, head: Any, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Of a few tokens, how far the logits of body and head are from the model's own, and what rounding allows: []."""
    mixed, dtype = precision_of(model, head.weight)
    probe = torch.arange(1, min(9, len(head.weight)), device=head.weight.device)[None]
    with eval_mode(model), torch.autocast(head.weight.device.type, dtype, enabled=mixed):
        expected = model(input_ids=probe).logits.float()
        found = head.logits(body(input_ids=probe, use_cache=False).last_hidden_state)
    width = min(expected.shape[-1], found.shape[-1])  # some cut the padded columns off
    # Two ways through the same arithmetic: what remains is the rounding of one matrix product.
    allowed = 64 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)
    return (expected[..., :width] - found[..., :width]).abs().max(), allowed


def precision_of(model: PreTrainedModel, weight: Tensor) -> tuple[bool, torch.dtype]:
    """Whether autocast has to be on, and the dtype computed in: FlashAttention takes no float32, as a student is."""
    mixed = "flash" in model.config._attn_implementation and weight.dtype == torch.float32
    return mixed, torch.bfloat16 if mixed else weight.dtype


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """As it is sampled from and trained: without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
