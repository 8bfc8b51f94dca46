"""`training.compile`: whether a run compiles its layers, and that the compiler takes them."""

import torch
from torch import nn

from distill.config import Config, ConfigError
from distill.loss import ModelParts
from distill.models import compile_layers
from distill.runtime import is_out_of_memory
from distill.training import Ranks

# Optimizer steps from which `auto` compiles. It takes about a minute; the smallest student's step on a GPU takes 0.4 s.
WORTHWHILE_STEPS = 500


def wants_compiling(config: Config, device: torch.device, ranks: Ranks, prompts: int) -> bool:
    """Whether a run over so many prompts compiles. Raises `ConfigError` where that is asked for and cannot be had."""
    training = config.training
    possible = device.type == "cuda" and not ranks.sharded
    if training.compile == "auto":
        steps = training.num_epochs * -(-prompts // training.prompts_per_step)
        return possible and min(steps, training.max_steps or steps) >= WORTHWHILE_STEPS
    if training.compile and not possible:
        found = "training.parallel: shard" if ranks.sharded else f"training.device: {device.type}"
        raise ConfigError(f"training.compile: found true with {found}; it is for a GPU that holds its models whole")
    return training.compile


def compile_parts(parts: ModelParts, backend: str = "inductor") -> str | None:
    """Compiles the layers of a model, forward and, where it is trained, backward. Why not, where the compiler fails."""
    compile_layers(parts.body, backend)
    trained = [weight for weight in parts.body.parameters() if weight.requires_grad]
    device, tokens = parts.head.weight.device, [torch.arange(length)[None] for length in (9, 5, 7)]
    prompt, *said = (ids.to(device) % parts.head.weight.shape[0] for ids in tokens)
    completions = torch.cat([nn.functional.pad(ids, (0, 7 - ids.shape[1])) for ids in said])
    try:
        mask, lengths = torch.ones(1, 9, dtype=torch.bool), torch.tensor([5, 7])
        with torch.set_grad_enabled(bool(trained)), parts.present():
            hidden = parts.hidden(prompt, mask, completions, lengths, torch.zeros(2, dtype=torch.int64))
            if trained:
                torch.autograd.grad(hidden.float().sum(), trained, allow_unused=True)
    # What a compiler makes of a model is open-ended.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        for module in parts.body.modules():
            module._compiled_call_impl = None
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None
