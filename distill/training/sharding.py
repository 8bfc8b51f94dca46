"""A model's weights shared out over ranks with FSDP2: layer by layer, embedding and head together in one root."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distill.forward import refuse_like
from distill.loss import ModelParts
from distill.models import Head, alias, body_of, layer_stack, other_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def share_out(model: "PreTrainedModel", parts: ModelParts, mesh: DeviceMesh) -> ModelParts:
    """Shares the weights of `model` out over the ranks; returns what takes the place of its `parts`.

    Whether it can share prompts `check_sharing` has tried before, when other ranks need not do the same. Raises
    `ModelError`.
    """
    called = _Called(alias(model))
    refuse_like(parts.body, called)
    # Inputs stay the very objects that they are: our attention counts its calls in one of them.
    policy = MixedPrecisionPolicy(parts.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    parent, name = layer_stack(called.model, "training.parallel shard")
    unused = set(other_parameters(called.model))
    for module in (*getattr(parent, name), called):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=unused)
        # Weights of tokens are global: ranks add up.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    shards = dict(called.model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = shards[f"{path}.{name}".lstrip(".")]
    # What the root has gathered stays until a backward pass, which a teacher never has.
    head = _GatheredHead(called.model, parts.head)
    return parts._replace(body=called, head=head, one_call=True, refresh=called.reshard)


class _Called(nn.Module):
    """A model of which the body is called, and the head gathered with it: one FSDP root holds what no layer does."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._supports_attention_backend = getattr(body_of(model), "_supports_attention_backend", False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, **inputs: Any) -> Any:
        return body_of(self.model)(**inputs)


class _GatheredHead:
    """A `models.Head` whose weight is in one piece from a call of the body to the end of the backward pass."""

    def __init__(self, model: "PreTrainedModel", head: Head) -> None:
        self._output, self.softcap, self.scale = model.get_output_embeddings(), head.softcap, head.scale

    @property
    def weight(self) -> Tensor:
        return self._output.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self._output, "bias", None)

    logits, finished = Head.logits, Head.finished
