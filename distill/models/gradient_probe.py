"""Whether two ways to compute a body's hidden states have the same gradients, tried on the body itself.

Hidden states alone do not tell: a layer that ignores what came before may move them by 4e-5 and the gradient by 66 %.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Parameters of at most so many elements are compared: those that are a state layer's own, its decay, gate and
# convolution, have fewer; gradients of larger ones would need their memory again.
SMALL = 2**16
PROMPT, COMPLETIONS = 5, (2, 4)  # tokens; rows, tokens


def gradients_apart(body: nn.Module, ways: list[Callable[[Tensor, Tensor], Tensor]]) -> float:
    """The relative distance of two ways' gradients with respect to the tokens' embeddings and small parameters.

    A way takes one prompt [1, P] and its completions [R, T], all of it tokens, to hidden states. The larger of the two
    distances is given, infinity where there is no gradient. The body is in eval mode meanwhile, as dropout differs.
    """
    modes = [(module, module.training) for module in body.modules()]
    token_ids = torch.arange(PROMPT + COMPLETIONS[0] * COMPLETIONS[1], device=body.device)
    embedding = body.get_input_embeddings()
    parameters = [each for each in body.parameters() if each.requires_grad and each.numel() <= SMALL]
    try:
        body.eval()
        with torch.no_grad():
            added = torch.zeros_like(embedding(token_ids)).requires_grad_()  # to each token's embedding
        hook = embedding.register_forward_hook(lambda module, arguments, output: output + added[arguments[0]])
        try:
            found = [_gradients(way, token_ids, [added, *parameters]) for way in ways]
        finally:
            hook.remove()
    finally:
        for module, training in modes:
            module.training = training
    distances = [_distance(*pair) for pair in zip(*found, strict=True)]
    return max(distances, key=lambda distance: torch.inf if distance != distance else distance)


def _gradients(
    way: Callable[[Tensor, Tensor], Tensor], token_ids: Tensor, leaves: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of a random weighting of the hidden states, to the first leaf and to all others in one vector."""
    with torch.enable_grad():
        hidden = way(token_ids[None, :PROMPT], token_ids[PROMPT:].view(COMPLETIONS))
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        gradients = torch.autograd.grad((hidden * weight).sum(), leaves, allow_unused=True)
    flat = [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, gradients, strict=True)]
    flat = [each.flatten().float() for each in flat]
    return flat[0], torch.cat([flat[0][:0], *flat[1:]])


def _distance(expected: Tensor, found: Tensor) -> float:
    """0 of nothing."""
    return float((found - expected).norm() / expected.norm()) if expected.numel() else 0.0
