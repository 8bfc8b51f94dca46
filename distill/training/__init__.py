"""The loop and its figures: `prompts -> rollout -> score -> loss -> step`, evaluations, and the same over ranks.

In: models' parts, an engine, prompts. Out: a `StepResult` an optimizer step; figures of an evaluation.
"""

from distill.training.accuracy import Judged, judged_figures, pass_figures, record_metrics
from distill.training.answers import Answers
from distill.training.comparison import compare
from distill.training.evaluation import Evaluation, change_since, check_against_itself, decode_samples, evaluate
from distill.training.judging import calls_of, running
from distill.training.mixture import Mixture, mixture_metrics
from distill.training.ranks import Ranks
from distill.training.rewards import Task, TaskRewards, started_tasks
from distill.training.state import restore, state_of
from distill.training.token_records import token_view
from distill.training.trainer import StepResult, Trainer
from distill.training.vllm_ranks import RankedVllmEngine
from distill.training.warm_start import WARM_START, WarmStart

__all__ = [
    "WARM_START",
    "Answers",
    "Evaluation",
    "Judged",
    "Mixture",
    "RankedVllmEngine",
    "Ranks",
    "StepResult",
    "Task",
    "TaskRewards",
    "Trainer",
    "WarmStart",
    "calls_of",
    "change_since",
    "check_against_itself",
    "compare",
    "decode_samples",
    "evaluate",
    "judged_figures",
    "mixture_metrics",
    "pass_figures",
    "record_metrics",
    "restore",
    "running",
    "started_tasks",
    "state_of",
    "token_view",
]
