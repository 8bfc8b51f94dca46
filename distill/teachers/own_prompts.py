"""A prompt of a teacher's own for each record: a column that holds it, or a template that writes it.

Text takes the place of the last turn, a conversation that of the whole. A template comes with the configuration, and
sees data that anybody may have written: it runs in a sandbox, and a column that it names and a record lacks is an error
and never an empty place.
"""

from collections import Counter
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from distill.config import FrozenModel
from distill.prompts import PromptError, conversation_of

Message = dict[str, Any]

COLUMN = "teacher_prompt"
TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
# What a template can make of the values of a record has no common class.
FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


class OwnPrompts:
    """The prompts that one teacher sees in place of the student's."""

    def __init__(self, section: FrozenModel, key: str) -> None:
        """`key` is where the section stands, for messages. Raises `PromptError` for what is no template."""
        self._column, self._key = section.column or COLUMN, key
        self.counts: Counter[str] = Counter()
        """`with` and `without`, of the records that were asked for."""
        self._template, self._named = None, frozenset([self._column])
        if section.prompt_template is None:
            return
        try:
            self._named = frozenset(meta.find_undeclared_variables(TEMPLATES.parse(section.prompt_template)))
            self._template = TEMPLATES.from_string(section.prompt_template)
        except TemplateError as error:
            line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            raise PromptError(f"{key}.prompt_template{line}: no Jinja template: {error}") from None

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of a record that decide what the teacher sees."""
        return tuple(sorted(self._named)) if self._template or self.counts["with"] else ()

    def __call__(self, record: dict[str, Any], messages: list[Message], text: str) -> list[Message] | None:
        """The conversation that the teacher sees, None where it is the student's `messages`, whose last turn is `text`.

        Raises `PromptError`.
        """
        own = record.get(self._column) if self._template is None else self._rendered(record, text)
        if own is None or (isinstance(own, str) and not own.strip()):
            self.counts["without"] += 1
            return None
        self.counts["with"] += 1
        if isinstance(own, str):
            return [*messages[:-1], {"role": "user", "content": own}]
        where = f"the prompt {text[:60]!r}, column {self._column!r}"
        found = conversation_of(record, where, self._column).messages
        if found[-1]["role"] == "assistant":
            raise PromptError(f"{where}: it ends in an answer, and the student's completion stands there: leave it out")
        return found

    def _rendered(self, record: dict[str, Any], text: str) -> str:
        known = {name: value for name, value in record.items() if value is not None} | {"prompt": text}
        try:
            return self._template.render(known)
        except FAILURES as error:
            raise PromptError(
                f"the prompt {text[:60]!r}: {self._key}.prompt_template: {error}; this record has "
                f"{', '.join(known)}. Where only some records have a column, write {{% if NAME is defined %}} around "
                f"it: what is left empty is the student's own prompt"
            ) from None
