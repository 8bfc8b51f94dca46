"""Metrics and task rewards: functions, built in or the user's own, that give a completion a number.

In: references such as `exact_match` or `rewards.py:score`; records of a prompt file, each with a completion. Out: a
`Grade` for each. They run in processes of their own: whatever one does costs its own value only, and leaves nothing.
"""

from distill.grading.functions import FunctionError, GradingFunction, names, resolve
from distill.grading.grader import Grader
from distill.grading.process import Grade

__all__ = ["FunctionError", "Grade", "Grader", "GradingFunction", "names", "resolve"]
