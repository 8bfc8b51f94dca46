"""Hidden states of completion tokens, for student and teacher alike; a prompt is computed once for all its rollouts.

In: a body, token ids and lengths. Out: hidden states [K, H] that predict the completions' tokens.
"""

from distill.forward.cpu_linear import OneDnnLinears
from distill.forward.hidden import completion_hidden, refuse, refuse_like, why_plain

__all__ = ["OneDnnLinears", "completion_hidden", "refuse", "refuse_like", "why_plain"]
