"""What the teachers see of each prompt, and which of them score it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from distill.config import MAIN, FrozenModel
from distill.loss import TeacherView
from distill.prompts import PromptError, PromptSet, PromptTokeniser, left_pad
from distill.teachers.own_prompts import OwnPrompts
from distill.teachers.teacher import Teacher

Seen = Mapping[int, tuple[list[int], float]]  # by teacher: the prompt's token ids as it sees them, and its weight


class TeacherPrompts:
    """What M teachers see of a prompt set, and what the loss to each weighs."""

    def __init__(
        self,
        seen: Sequence[Seen],
        num_teachers: int,
        pad_token_id: int,
        columns: Sequence[str] = (),
        remarks: Sequence[str] = (),
    ) -> None:
        self.seen, self.columns, self.remarks = seen, tuple(columns), tuple(remarks)
        self._count, self._pad = num_teachers, pad_token_id

    @property
    def digest(self) -> str:
        """Tells what the teachers see, and what they weigh, from anything else."""
        return hashlib.sha256(json.dumps([sorted(each.items()) for each in self.seen]).encode()).hexdigest()

    def view(self, indices: Sequence[int]) -> TeacherView:
        """Of some prompts."""
        nothing = ([self._pad], 0.0)  # for who scores others only
        found = [[self.seen[i].get(teacher, nothing) for i in indices] for teacher in range(self._count)]
        weight = torch.tensor([[weight for _, weight in of_teacher] for of_teacher in found])
        return TeacherView([left_pad([ids for ids, _ in each], self._pad) for each in found], weight.T)


def teacher_prompts(
    prompts: PromptSet,
    teachers: Sequence[Teacher],
    *,
    longest: int | None,
    pad_token_id: int,
    special: bool,
    templated: bool = True,
    template_arguments: Mapping[str, Any] | None = None,
) -> TeacherPrompts | None:
    """The prompts as the teachers see them; None where there is one teacher and it sees the student's.

    `longest` is how many tokens of prompt the teachers can take, `special` as for `PromptTokeniser`; `templated` and
    `template_arguments` are what holds for the student, unless a teacher has arguments of its own. Raises
    `PromptError`.
    """
    sights = [_Sight(teacher, special, templated, template_arguments or {}) for teacher in teachers]
    known = {teacher.name: index for index, teacher in enumerate(teachers)} | {MAIN: 0}
    seen: list[Seen] = []
    for index, (name, text) in enumerate(zip(prompts.teachers, prompts.texts, strict=True)):
        weights = name if isinstance(name, dict) else {name: 1.0}
        if strange := [one for one in weights if one not in known]:
            raise PromptError(
                f"the prompt {text[:60]!r} names the teacher {strange[0]!r}, and teacher.others has "
                f"{', '.join(teacher.name for teacher in teachers if teacher.name) or 'none'}"
            )
        found = {known[one]: (sights[known[one]].ids(prompts, index), weight) for one, weight in weights.items()}
        for ids, _ in found.values():
            if longest is not None and len(ids) > longest:
                raise PromptError(
                    f"the prompt {text[:60]!r} has {len(ids)} tokens as the teacher sees it, and {longest} fit its "
                    f"context before the completion: shorten what it sees, or lower prompts.max_tokens"
                )
        seen.append(found)
    for sight in sights:
        sight.check_column(prompts)
    same = all(found.keys() == {0} and found[0][0] is ids for found, ids in zip(seen, prompts.token_ids, strict=True))
    if len(teachers) == 1 and same:
        return None
    columns = sorted({column for sight in sights for column in sight.own.columns} - {"prompt"})
    return TeacherPrompts(seen, len(teachers), pad_token_id, columns, [line for s in sights for line in s.remarks()])


class _Sight:
    """What one teacher sees."""

    def __init__(self, teacher: Teacher, special: bool, templated: bool, template_arguments: Mapping[str, Any]) -> None:
        self.section: FrozenModel = teacher.section
        self._key = f"teacher.others.{teacher.name}" if teacher.name else "teacher"
        self.own = OwnPrompts(self.section, self._key)
        self._of_all = self.section.system_prompt is not None or bool(self.section.chat_template_kwargs)
        has_template = teacher.tokenizer.chat_template is not None
        if self._of_all and not has_template:
            raise PromptError(
                f"{self._key}.system_prompt and {self._key}.chat_template_kwargs need a chat template, and the "
                f"teacher's tokenizer has none: leave them out or choose an instruction-tuned teacher"
            )
        arguments = {**template_arguments, **self.section.chat_template_kwargs}
        templated = has_template and (templated or self._of_all)
        try:
            self._tokeniser = PromptTokeniser(teacher.tokenizer, templated, special=special, **arguments)
        except TypeError as error:  # one that has another meaning here
            raise PromptError(f"{self._key}.chat_template_kwargs: {error}") from None

    def ids(self, prompts: PromptSet, index: int) -> list[int]:
        """A prompt's ids as the teacher sees it: the very list of the student's where nothing is changed."""
        messages, text = prompts.messages[index], prompts.texts[index]
        own = self.own(prompts.records[index], messages, text)
        if own is None and not self._of_all:
            return prompts.token_ids[index]
        messages = own or messages
        if self.section.system_prompt is not None:
            others = messages[1:] if messages[0]["role"] == "system" else messages
            messages = [{"role": "system", "content": self.section.system_prompt}, *others]
        if not self._tokeniser.templated and len(messages) > 1:
            raise PromptError(f"the prompt {text[:60]!r}: a conversation needs a chat template, and there is none")
        try:
            return self._tokeniser(messages, prompts.tools[index])
        except (UnicodeError, TemplateError, TypeError, PromptError) as error:
            raise PromptError(f"the prompt {text[:60]!r} cannot be tokenised for the teacher: {error}") from None

    def check_column(self, prompts: PromptSet) -> None:
        """Raises `PromptError` for a column that no record has, of those that it scores."""
        counts, column = self.own.counts, self.section.column
        if column is not None and counts["without"] and not counts["with"]:
            names = ", ".join(sorted({name for record in prompts.records for name in record}))
            raise PromptError(f"{self._key}.column: none of the records has a prompt in {column!r}; they have {names}")

    def remarks(self) -> list[str]:
        """How many records have no prompt of their own for it, where some have."""
        counts = self.own.counts
        if not counts["with"]:
            return []
        without = f"; for {counts['without']} it sees what the student sees" if counts["without"] else ""
        return [f"{self._key} has a prompt of its own for {counts['with']} of {counts.total()} prompts{without}"]
