"""Whether a model whose prompts are computed once gives what it gives row by row, tried once before it is used.

What a model tells its attention function is all that sharing can know of it. One that means more than it tells, such
as a soft cap that another attention leaves out, is found here, and computed row by row from then on.
"""

import warnings

import torch

from distill.forward import refuse, why_plain
from distill.loss.model_parts import ModelParts

PROMPT, ROWS, TOKENS = 8, 4, 6
# Relative distances of hidden states that rounding explains, of float32 and of what has fewer digits.
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.1


@torch.no_grad()
def check_sharing(model: ModelParts) -> str | None:
    """Has a model compute each row with its own prompt where a prompt computed once gives something else.

    Returns why rows are computed so, for this or another reason; None where prompts are computed once.
    """
    if model.elsewhere:
        return None
    tokens = torch.arange(PROMPT + ROWS * TOKENS, device=model.head.weight.device) % len(model.head.weight)
    prompt, said = tokens[None, :PROMPT], tokens[PROMPT:].view(ROWS, TOKENS)
    mask, lengths = torch.ones(ROWS, PROMPT, dtype=torch.bool), [TOKENS] * ROWS
    with model.present(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what would be said is returned
        once = model.hidden(prompt, mask[:1], said, lengths, [0] * ROWS).float()
        each = model.hidden(prompt.expand(ROWS, PROMPT), mask, said, lengths, range(ROWS)).float()
    error = float((once - each).norm() / each.norm())
    if not error < (TOLERANCE if model.dtype == torch.float32 else ROUNDED_TOLERANCE):
        refuse(model.body, f"its hidden states are {error:.1e} off where a prompt is computed once")
    return why_plain(model.body)
