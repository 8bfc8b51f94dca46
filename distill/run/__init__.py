"""One run around the loop: loading, checkpoints, logs, display, trackers, and what is written at the end.

In: a `Config`. Out: the output folder with its files, and a `Summary`.
"""

from distill.run.checkpoint import CheckpointError
from distill.run.engines import make_engine
from distill.run.health import StoppedError
from distill.run.hub import HubError
from distill.run.judges import Judges, failures
from distill.run.loading import choose_device, choose_dtype, load_alone, load_pair
from distill.run.output import OutputError
from distill.run.prompt_sets import SAMPLER, load_prompt_sets
from distill.run.run import Run
from distill.run.summary import Summary

__all__ = [
    "SAMPLER",
    "CheckpointError",
    "HubError",
    "Judges",
    "OutputError",
    "Run",
    "StoppedError",
    "Summary",
    "choose_device",
    "choose_dtype",
    "failures",
    "load_alone",
    "load_pair",
    "load_prompt_sets",
    "make_engine",
]
