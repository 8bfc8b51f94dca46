"""A client of OpenAI-compatible servers (vLLM, SGLang): requests that are tried again, and what is asked of a prompt.

In: a URL. Out: JSON, log-probabilities of a prompt's tokens, or their hidden states.
"""

from distill.servers.client import Server, ServerError, UnavailableError, in_parallel
from distill.servers.probe import PROBE, TOLERANCE, Probe, mean_gap
from distill.servers.prompt_scores import PromptScores
from distill.servers.prompt_states import PLUGIN, PromptStates

__all__ = [
    "PLUGIN",
    "PROBE",
    "TOLERANCE",
    "Probe",
    "PromptScores",
    "PromptStates",
    "Server",
    "ServerError",
    "UnavailableError",
    "in_parallel",
    "mean_gap",
]
