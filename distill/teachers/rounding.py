"""`teacher.precision` int8 and int4: the weights of a teacher's linear layers in fewer bits; head and embeddings stay.

Weights only, which are expanded before each product. Scoring multiplies thousands of tokens by each weight, so what
that takes is small beside the product, and the kernels that multiply packed weights, made for the few rows of a decode
step, are not what is wanted. torchao has 8 bits that way, but no 4 bits that a CPU keeps in less memory.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from distill.models import ModelError, split_head

GROUP = 32  # weights of a row that share a scale; with 64 of them, rounding costs several times the reverse KL


def round_weights(model: PreTrainedModel, precision: str) -> None:
    """Rounds the body's linear layers of a frozen model to `int8` or `int4`, in place. Raises `ModelError`."""
    if getattr(model, "hf_quantizer", None):
        raise ModelError(
            f"teacher.precision {precision}: the model is stored quantised already, and used so: leave it out"
        )
    body, head = split_head(model)[0], model.get_output_embeddings()
    if precision == "int8":
        _to_int8(body, head)
        return
    for layer in list(body.modules()):
        if isinstance(layer, nn.Linear) and layer is not head and layer.in_features % GROUP == 0:
            register_parametrization(layer, "weight", FourBits(layer.weight.dtype), unsafe=True)  # of another dtype


def _to_int8(body: nn.Module, head: nn.Module) -> None:
    """8 bits, one scale a row."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f"teacher.precision int8 needs the package torchao ({error}): pip install 'distill-on-policy[int8]'"
        ) from None
    chosen = {"filter_fn": lambda module, _: isinstance(module, nn.Linear) and module is not head}
    quantize_(body, Int8WeightOnlyConfig(), **chosen)


class FourBits(nn.Module):
    """A weight [out, in] in 4 bits, with a scale and a least value of 16 bits a group: 5 bits a weight in all."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two codes a byte [out, groups, GROUP / 2], scales and least values [out, groups, 1]."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        least, largest = groups.aminmax(dim=-1, keepdim=True)
        least, scale = least.half(), ((largest - least) / 15).clamp(min=2**-24).half()  # the least above 0
        codes = ((groups - least.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
        return codes[..., ::2] | codes[..., 1::2] << 4, scale, least

    def forward(self, codes: Tensor, scale: Tensor, least: Tensor) -> Tensor:
        """The weight [out, in] as it is computed with."""
        apart = torch.stack((codes & 15, codes >> 4), -1).flatten(2)
        return torch.addcmul(least.to(self._dtype), apart.to(self._dtype), scale.to(self._dtype)).flatten(1)
