"""Whether two ways to compute a body's hidden states have the same gradients, tried on the body's own first layers.

Its weights are scaled to matter: in an untrained model, whose weights are small, a layer that ignores what came before
may move the hidden states by 4e-5 only, and yet the gradient by 66 % once they have grown. Half precision would hide as
much in its rounding: it is tried in float32 where the layers compute in float32 at all.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.structure import alias

PROMPT, ROWS, TOKENS = 5, 2, 4
# Relative distances that rounding explains, of float32 and of what has fewer digits.
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.1

Way = Callable[[nn.Module, Tensor, Tensor], Tensor]


def gradients_differ(body: PreTrainedModel, plainly: Way, shared: Way) -> str | None:
    """What is wrong with the second way's gradients to tokens' embeddings and to parameters, or None.

    A way takes a body, a prompt [1, P] and its completions [R, T], all of it tokens, to their hidden states. Whatever
    it raises, running out of memory included, is an answer: that sharing is not for this model.
    """
    autocast = torch.is_autocast_enabled(body.device.type)
    rounds = autocast or body.dtype != torch.float32
    try:
        with torch.enable_grad(), torch.autocast(body.device.type, enabled=False):
            probe = _first_layers(body)
            exact = copy.deepcopy(probe).float()
            try:
                expected, tolerance = _gradients(exact, plainly), TOLERANCE
            except Exception:  # kernels for half precision alone
                if not rounds:
                    raise
                expected = None
            if expected is not None:
                found = _gradients(exact, shared)
        with torch.enable_grad():
            if expected is None:
                expected, found, tolerance = _gradients(probe, plainly), _gradients(probe, shared), ROUNDED_TOLERANCE
            elif rounds:
                _gradients(probe, shared)  # whether it runs
    except Exception as error:
        return (
            f"going on from a prompt's states raises {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        )
    apart = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, expected, strict=True)]
    if all(distance < tolerance for distance in apart):
        return None
    return f"the gradient through a prompt's states is {max(apart):.1%} off"


def _first_layers(body: PreTrainedModel) -> PreTrainedModel:
    """A copy of the body with its first layers, each kind among them, and the embeddings of a few tokens."""
    probe = alias(body).eval()  # dropout would differ
    kinds = list(getattr(body.config.get_text_config(), "layer_types", None) or ())
    count = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    for name, child in probe.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == len(kinds):
            setattr(probe, name, child[:count])
    embedding = probe.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        weight = embedding.weight[: PROMPT + ROWS * TOKENS].detach().clone()
        probe.set_input_embeddings(nn.Embedding.from_pretrained(weight))
    probe = copy.deepcopy(probe)
    with torch.no_grad():
        for weight in probe.parameters():
            # Matrices, but none of decays, whose logarithms are far from 0.
            if weight.ndim > 1 and weight.mean().abs() < weight.std():
                weight.mul_(weight.shape[-1] ** -0.5 / weight.std())
    return probe


def _gradients(probe: PreTrainedModel, way: Way) -> list[Tensor]:
    """Of a random weighting of the hidden states after the prompt: to the embeddings of the prompt's tokens, which they
    depend on through what layers keep, and to these, those of the completions and all trained parameters at once."""
    token_ids = torch.arange(PROMPT + ROWS * TOKENS, device=probe.device)
    embedding = probe.get_input_embeddings()
    added = torch.zeros_like(embedding(token_ids)).requires_grad_()
    hook = embedding.register_forward_hook(lambda module, arguments, output: output + added[arguments[0]])
    try:
        hidden = way(probe, token_ids[None, :PROMPT], token_ids[PROMPT:].view(ROWS, TOKENS))
    finally:
        hook.remove()
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    weight[::TOKENS] = 0.0  # the prompt's own last state, from which the first token is predicted
    leaves = [added, *(parameter for parameter in probe.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad((hidden * weight).sum(), leaves, allow_unused=True)
    flat = [
        (torch.zeros_like(leaf) if gradient is None else gradient).flatten().float()
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    return [flat[0].view_as(added)[:PROMPT].flatten(), torch.cat(flat)]
