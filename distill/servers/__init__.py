"""A client of OpenAI-compatible servers (vLLM, SGLang): requests that are tried again, and what is asked of a prompt.

In: a URL. Out: JSON, and log-probabilities of a prompt's tokens.
"""

from distill.servers.client import Server, ServerError, UnavailableError, in_parallel
from distill.servers.prompt_scores import PROBE, PromptScores

__all__ = ["PROBE", "PromptScores", "Server", "ServerError", "UnavailableError", "in_parallel"]
