"""A client of OpenAI-compatible servers (vLLM, SGLang): requests that are tried again, and what is asked of a prompt.

In: a URL. Out: JSON, and log-probabilities of a prompt's tokens.
"""

from distill.servers.client import Server, ServerError, UnavailableError, in_parallel
from distill.servers.prompt_scores import PROBE, TOLERANCE, PromptScores

__all__ = ["PROBE", "TOLERANCE", "PromptScores", "Server", "ServerError", "UnavailableError", "in_parallel"]
