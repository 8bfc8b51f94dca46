"""`training.compile`: whether a run compiles its layers, and that the compiler takes them."""

import torch

from distill.config import Config, ConfigError
from distill.loss import ModelParts
from distill.models import compile_layers, uncompile_layers
from distill.run.loading import some_rows
from distill.runtime import is_out_of_memory
from distill.training import Ranks

# Optimizer steps from which `auto` compiles. It takes about a minute; the smallest student's step on a GPU takes 0.4 s.
WORTHWHILE_STEPS = 500


def wants_compiling(config: Config, device: torch.device, ranks: Ranks, steps: int = 0) -> bool:
    """Whether a run of so many steps compiles. Raises `ConfigError` where that is asked for and cannot be had."""
    asked, possible = config.training.compile, device.type == "cuda" and not ranks.sharded
    if asked == "auto":
        return possible and steps >= WORTHWHILE_STEPS
    if asked and not possible:
        found = "training.parallel: shard" if ranks.sharded else f"training.device: {device.type}"
        raise ConfigError(f"training.compile: found true with {found}; it is for a GPU that holds its models whole")
    return asked


def compile_parts(parts: ModelParts, backend: str = "inductor") -> str | None:
    """Compiles the layers of a model, forward and, where it is trained, backward. Why not, where the compiler fails."""
    compile_layers(parts.body, backend)
    trained = [weight for weight in parts.body.parameters() if weight.requires_grad]
    try:
        with torch.set_grad_enabled(bool(trained)), parts.present():
            hidden = parts.hidden(*some_rows(parts))
            if trained:
                torch.autograd.grad(hidden.float().sum(), trained, allow_unused=True)
    # What a compiler makes of a model is open-ended.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        uncompile_layers(parts.body)
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None
