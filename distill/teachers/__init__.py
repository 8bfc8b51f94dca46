"""The frozen models that score: loaded here or served elsewhere, and the prompts that they see.

In: the `teacher` section. Out: `Teacher`s, whose parts the loss takes, and what each scores.
"""

from distill.teachers.following import FollowingTeacher
from distill.teachers.local import load_teachers
from distill.teachers.no_teacher import NO_TEACHER
from distill.teachers.own_prompts import OwnPrompts
from distill.teachers.prompts import TeacherPrompts, teacher_prompts
from distill.teachers.teacher import Teacher, context_of

__all__ = [
    "NO_TEACHER",
    "FollowingTeacher",
    "OwnPrompts",
    "Teacher",
    "TeacherPrompts",
    "context_of",
    "load_teachers",
    "teacher_prompts",
]
