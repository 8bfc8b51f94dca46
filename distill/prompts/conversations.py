"""What a record says: its conversation, the tools that the conversation has, and its teacher.

Content is text or, beside tool calls, null. Left out on purpose: content in parts, which are of pictures and sounds.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from distill.prompts.records import PromptError, Record

Message = dict[str, Any]
Tools = list[dict[str, Any]]
Mixture = dict[str, float]  # each teacher's share of a prompt's loss; they add up to 1

ROLES = ("system", "user", "assistant", "tool")
COLUMNS = ("prompt", "messages")


class Conversation(NamedTuple):
    """A record's messages as a template takes them, and what goes with them."""

    column: str
    """Where the messages are from."""
    messages: list[Message]
    tools: Tools | None
    teacher: str | Mixture | None


def conversation_of(record: Record, where: str, column: str | None) -> Conversation:
    """What a record says; null parts of messages are left out, but for content. Raises `PromptError`."""
    key = column or next((name for name in COLUMNS if record.get(name) is not None), "")
    value = record.get(key)
    if isinstance(value, str) and key != "messages":
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list) and all(map(is_message, value)):
        messages = list(map(without_nulls, value))
    else:
        place = (
            f"the column {column!r}"
            if column
            else "a column `prompt` or `messages` (another is named by prompts.column)"
        )
        found = f"{key}: {value!r}" if key in record else f"the columns {', '.join(record)}"
        raise PromptError(
            f"{where}: expected in {place} text or a list of {{'role': ..., 'content': ...}} with a role of "
            f"{', '.join(ROLES)} and text as content, or null beside tool_calls; found {found:.120}"
        )
    return Conversation(key, messages, _tools(record.get("tools"), where), _teacher(record.get("teacher"), where))


def last_text(messages: Sequence[Message]) -> str:
    """The text of a conversation's last turn; none where that turn holds tool calls alone."""
    return messages[-1].get("content") or ""


def texts_in(value: Any) -> Iterator[str]:
    """Every text that is nested in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value:
            yield from texts_in(part)
        for part in value.values() if isinstance(value, dict) else ():
            yield from texts_in(part)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every nested text changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): with_texts(part, change) for name, part in value.items()}
    return [with_texts(part, change) for part in value] if isinstance(value, list) else value


def without_nulls(message: Message) -> Message:
    """A message without parts that are null, but for its content."""
    return {name: part for name, part in message.items() if part is not None or name == "content"}


def is_message(value: Any) -> bool:
    """Whether it has a role and text as content, or none beside tool calls."""
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        return False
    content = value.get("content")
    return isinstance(content, str) or (content is None and bool(value.get("tool_calls")))


def _tools(value: Any, where: str) -> Tools | None:
    """What the column `tools` lists; None where that is nothing."""
    found = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(value) if value.strip() else None
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise PromptError(
            f"{where}: expected in the column 'tools' a list of the tools that the conversation has, each as "
            f"{{'type': 'function', ...}}, or text that holds it as JSON; found {value!r:.120}. Rename a column that "
            f"holds something else"
        )
    return found or None


def _teacher(value: Any, where: str) -> str | Mixture | None:
    """What the column `teacher` names; None where that is nothing. Shares that are null are of a table's other rows."""
    if isinstance(value, dict):
        value = {name: share for name, share in value.items() if share is not None}
        shares = [share for share in value.values() if isinstance(share, int | float) and not isinstance(share, bool)]
        sound = len(shares) == len(value) and all(share > 0 and math.isfinite(share) for share in shares)
        if value and not (sound and abs(sum(shares) - 1) <= 1e-6):
            raise PromptError(
                f"{where}: expected in the column 'teacher' a name, or names with shares above 0 that add up to 1, as "
                f"{{'math': 0.7, 'chat': 0.3}}; found {value!s:.120}"
            )
    elif value is not None and not isinstance(value, str):
        raise PromptError(f"{where}: expected a teacher's name as text, or names with shares; found {value!s:.80}")
    return value or None
