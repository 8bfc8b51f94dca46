"""From hidden states to gradients: groups, the weight and the credit of each token, the objective.

In: `Rollouts` and two models' parts. Out: gradients in the student's parameters, and each token's statistics.
"""

from distill.loss.gradients import GroupGradient, accumulate_gradients, score
from distill.loss.group import Group, TeacherView
from distill.loss.head_pair import AGREEMENT_TOKENS, HeadPair, TeacherStates
from distill.loss.model_parts import ModelParts
from distill.loss.options import LossOptions
from distill.loss.rollouts import Rollouts
from distill.loss.sharing import check_sharing
from distill.loss.token_statistics import over_teachers, statistics

__all__ = [
    "AGREEMENT_TOKENS",
    "Group",
    "GroupGradient",
    "HeadPair",
    "LossOptions",
    "ModelParts",
    "Rollouts",
    "TeacherStates",
    "TeacherView",
    "accumulate_gradients",
    "check_sharing",
    "over_teachers",
    "score",
    "statistics",
]
