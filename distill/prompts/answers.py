"""Written answers of records, as the token ids that a rollout would have after the prompt, its end included.

The ids are those that follow the prompt's where both are tokenised as one text. Where the prompt's ids are no beginning
of that, because a token would lie across the border or because the chat template writes an answered conversation in
another way, the answer is tokenised by itself: a rollout, too, begins after the prompt's last token.
"""

from collections.abc import Sequence
from typing import NamedTuple

from distill.prompts.conversations import Message, Tools, is_message, without_nulls
from distill.prompts.records import PromptError, Record
from distill.prompts.tokens import PromptTokeniser, Written

COLUMN = "completion"


class AnswerOptions(NamedTuple):
    """Which answers are wanted, and how a completion of the student ends."""

    column: str | None
    """Where they are; None: `completion`, else a conversation's last turn."""
    ends: frozenset[int]
    """The ids that end a completion."""
    end: int
    """The one of them that is put after an answer that the template does not end."""
    longest: int
    """Tokens after which a completion is cut."""


class Answer(NamedTuple):
    """One answer as a completion."""

    token_ids: list[int]
    finished: bool
    """Whether it has its end: it was not cut by length."""


class WrittenAnswer(NamedTuple):
    """An answer in the chat template."""

    whole: Written
    """Prompt and answer."""
    alone: Written
    """What stands after the prompt."""


def answer_of(record: Record, turns: Sequence[Message], where: str, column: str | None) -> Message | None:
    """What a record answers, `turns` being those of the assistant's that its conversation ends with; None: nothing.

    Raises `PromptError`.
    """
    value = record.get(column or COLUMN)
    if value is None and column is None:
        message = turns[0] if turns else None
    elif value is None or isinstance(value, str):
        message = None if value is None else {"role": "assistant", "content": value}
    elif isinstance(value, list) and len(value) == 1 and is_message(value[0]) and value[0]["role"] == "assistant":
        message = without_nulls(value[0])
    else:
        raise PromptError(
            f"{where}: expected in the column {column or COLUMN!r} an answer: text, or a list with one message of the "
            f"role assistant; found {value!r:.120}"
        )
    if message is None or not ((message.get("content") or "").strip() or message.get("tool_calls")):
        return None
    return message


class AnswerTokeniser:
    """Tokenises answers after prompts."""

    def __init__(self, tokeniser: PromptTokeniser, options: AnswerOptions) -> None:
        self._tokeniser, self._options = tokeniser, options
        self.apart = 0
        """Answers that the template does not write right after the prompt."""

    def write(self, messages: Sequence[Message], answer: Message, tools: Tools | None) -> WrittenAnswer:
        """The answer to a conversation in the chat template. Raises what `PromptTokeniser.write` does."""
        whole, alone, follows = self._tokeniser.write_answer(messages, answer, tools)
        self.apart += not follows
        return WrittenAnswer(whole, alone)

    def encode(self, answers: Sequence[WrittenAnswer], prompt_ids: Sequence[list[int]]) -> list[Answer]:
        """The answers after prompts with these ids."""
        whole = self._tokeniser.encode([each.whole for each in answers])
        pairs = zip(whole, prompt_ids, strict=True)
        rests = [ids[len(prompt) :] if ids[: len(prompt)] == prompt else None for ids, prompt in pairs]
        others = [each.alone for each, rest in zip(answers, rests, strict=True) if rest is None]
        alone = iter(self._tokeniser.encode(others, begins=False))
        return [self._ended(next(alone) if rest is None else rest) for rest in rests]

    def _ended(self, ids: list[int]) -> Answer:
        """Up to the first end, which it gets where it has none, and no longer than a completion."""
        at = next((index for index, token in enumerate(ids) if token in self._options.ends), None)
        ids = [*ids, self._options.end] if at is None else ids[: at + 1]
        longest = self._options.longest
        return Answer(ids[:longest], len(ids) <= longest)
