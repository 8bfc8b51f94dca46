"""Rollouts: N completions of each prompt, by our own decode loop, by that of transformers, or on a vLLM server.

In: left-padded prompts and the student's weights of now. Out: `Rollouts`; the same seed gives the same ones.
"""

from distill.rollout.choice import choose_dtype, local_engine
from distill.rollout.decode import SamplingOptions
from distill.rollout.engine import RolloutEngine
from distill.rollout.served_weights import ServedWeights
from distill.rollout.vllm import VllmEngine

__all__ = ["RolloutEngine", "SamplingOptions", "ServedWeights", "VllmEngine", "choose_dtype", "local_engine"]
