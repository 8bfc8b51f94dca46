"""What the teachers see of each prompt, and which of them scores it."""

import functools
from collections.abc import Sequence

import torch
from jinja2 import TemplateError

from distill.config import TeacherConfig
from distill.loss import TeacherView
from distill.prompts import PromptError, PromptSet, PromptTokeniser, left_pad
from distill.teachers.teacher import Teacher


class TeacherPrompts:
    """What the teachers see of a prompt set, and which of them scores each prompt."""

    columns: tuple[str, ...] = ()
    """Columns of the records that it was made from, beside the student's prompt and `teacher`."""
    digest: str = ""
    """SHA-256 of the token ids that the teachers see."""

    def __init__(self, token_ids: Sequence[Sequence[int]], teacher: Sequence[int], pad_token_id: int) -> None:
        self.token_ids, self.teacher, self._pad = token_ids, teacher, pad_token_id

    def view(self, indices: Sequence[int]) -> TeacherView:
        """Of some prompts."""
        ids, mask = left_pad([self.token_ids[i] for i in indices], self._pad)
        return TeacherView(ids, mask, torch.tensor([self.teacher[i] for i in indices]))


def teacher_prompts(
    prompts: PromptSet,
    teachers: Sequence[Teacher],
    config: TeacherConfig,
    *,
    longest: int | None,
    pad_token_id: int,
    special: bool,
) -> TeacherPrompts | None:
    """The prompts as the teachers see them; None where there is one teacher and it sees the student's.

    `longest` is how many tokens of prompt the teachers can take, `special` as for `PromptTokeniser`. Raises
    `PromptError`.
    """
    changed = config.system_prompt is not None or bool(config.chat_template_kwargs)
    if not changed and len(teachers) == 1 and not any(prompts.teachers):
        return None
    known = {teacher.name: index for index, teacher in enumerate(teachers)}
    token_ids, chosen = [], []

    @functools.cache
    def tokeniser(index: int) -> PromptTokeniser:
        if teachers[index].tokenizer.chat_template is None:
            raise PromptError(
                "teacher.system_prompt and teacher.chat_template_kwargs need a chat template, and the teacher's "
                "tokenizer has none: leave them out or choose an instruction-tuned teacher"
            )
        return PromptTokeniser(teachers[index].tokenizer, True, special=special, **config.chat_template_kwargs)

    for ids, messages, name in zip(prompts.token_ids, prompts.messages, prompts.teachers, strict=True):
        if name not in known:
            raise PromptError(
                f"the prompt {messages[-1]['content'][:60]!r} names the teacher {name!r}, and teacher.others has "
                f"{', '.join(filter(None, known)) or 'none'}"
            )
        chosen.append(known[name])
        token_ids.append(_seen(messages, tokeniser(known[name]), config) if changed else ids)
        if longest is not None and len(token_ids[-1]) > longest:
            raise PromptError(
                f"the prompt {messages[-1]['content'][:60]!r} has {len(token_ids[-1])} tokens as the teacher sees it, "
                f"and {longest} fit its context before the completion: shorten teacher.system_prompt or lower "
                f"prompts.max_tokens"
            )
    return TeacherPrompts(token_ids, chosen, pad_token_id)


def _seen(messages: list[dict[str, str]], tokeniser: PromptTokeniser, config: TeacherConfig) -> list[int]:
    """A prompt's ids with the teacher's own template, under its system prompt."""
    if config.system_prompt is not None:
        others = messages[1:] if messages[0]["role"] == "system" else messages
        messages = [{"role": "system", "content": config.system_prompt}, *others]
    try:
        return tokeniser(messages)
    except (UnicodeError, TemplateError, TypeError, PromptError) as error:
        raise PromptError(
            f"the prompt {messages[-1]['content'][:60]!r} cannot be tokenised for the teacher: {error}"
        ) from None
