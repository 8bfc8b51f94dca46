"""RMS norms as PyTorch's one kernel on a GPU, and in short calls on a CPU: as models write it out, a norm is six."""

import inspect

import torch
from torch import Tensor, nn

PROBE_ROWS = 4


class RmsNorm(nn.Module):
    """weight * x / rms(x), rounded once; models round to half precision before they multiply by the weight, too."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Of two dtypes, as under autocast, PyTorch takes no kernel of one, and says so.
        hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
        weight = self.weight.to(hidden_states.dtype)
        if hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32:
            size = len(weight)
            norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
            norm = torch.hypot(norm, torch.full((), (size * self.eps) ** 0.5))
            return torch.addcmul(torch.zeros(()), hidden_states / norm, weight, value=size**0.5)
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, self.eps)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """Replaces, in place, every norm that gives what `RmsNorm` gives, as a probe finds: a class's name says little."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            eps, weight = getattr(norm, "variance_epsilon", getattr(norm, "eps", None)), getattr(norm, "weight", None)
            takes_one = list(inspect.signature(norm.forward).parameters) in (["hidden_states"], ["x"])  # no gate
            if isinstance(eps, float) and isinstance(weight, nn.Parameter) and weight.dim() == 1 and takes_one:
                probe = torch.arange(PROBE_ROWS * len(weight), device=weight.device).sin().mul(3).add(1)
                probe, fused = probe.view(PROBE_ROWS, -1).to(weight.dtype), RmsNorm(weight, eps)
                if torch.allclose(fused(probe), norm(probe), rtol=2e-2, atol=1e-3):
                    setattr(parent, name, fused)
