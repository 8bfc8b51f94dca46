"""Prompts from records: the chat template, and the order in which prompts are drawn. `records.py` reads the files.

All prompts are tokenised before the first step and kept, so that their digest can guard a resumed run. The order is a
function of (seed, epoch) alone, so that such a run needs only its position. Text that happens to spell a control token
(`<|im_end|>`) stays text.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.prompts.records import BLANK, MAX_LINE_BYTES, PromptError, Record, read

Message = dict[str, str]
Conversation = tuple[list[Message], str | None]  # and the name of its teacher


@dataclass(frozen=True)
class PromptSet:
    """Tokenised prompts, and how many lines of the file were left out."""

    token_ids: list[list[int]]
    texts: list[str]
    """What the user says last in each."""
    messages: list[list[Message]]
    """The conversations as the tokenizer was given them."""
    teachers: list[str | None]
    """What each record's `teacher` names; None where it has none."""
    empty: int = 0
    """Blank lines, or records without text."""
    too_long: int = 0
    """Prompts above the token limit."""
    answered: int = 0
    """Conversations whose last message was the assistant's, which was left out."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def digest(self) -> str:
        """Tells one set of tokenised prompts, each with its teacher, from another."""
        told = [self.token_ids, self.teachers] if any(self.teachers) else self.token_ids
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


ROLES = ("system", "user", "assistant", "tool")
COLUMNS = ("prompt", "messages")
MARKS = "\U000f0d15", "\U000f0d16"  # private-use characters: no template gives them a meaning


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    chat_template: str = "auto",
    control_tokens: str = "text",
    max_tokens: int = 1024,
) -> PromptSet:
    """Reads and tokenises the first `limit` records, or all, of a prompt file, a folder or a hub dataset.

    `column` holds the prompt: text, or a conversation whose last turn the student answers; absent, one of COLUMNS.
    `control_tokens` says what those are that a prompt spells out: `text`, or `special` tokens.
    Raises `PromptError` for what is missing, not UTF-8, malformed, or without a usable prompt.
    """
    templated = chat_template == "auto" and tokenizer.chat_template is not None
    column = None if path.suffix == ".txt" else column
    columns = (column or COLUMNS[0], *COLUMNS, "teacher")
    token_ids, conversations, teachers, empty, too_long, answered = [], [], [], 0, 0, 0
    # Token ids are numbers met again and again: each is kept once.
    known = list(range(len(tokenizer)))
    for where, record in islice(read(path, columns, whole=limit is None, streaming=streaming), limit):
        if record is None:
            too_long += 1
            continue
        messages, teacher = ([], None) if record is BLANK else _conversation(record, where, column)
        answers = 0
        while messages and messages[-1]["role"] == "assistant":
            messages, answers = messages[:-1], 1
        answered += answers
        if not messages or not messages[-1]["content"].strip():
            empty += 1
            continue
        if not templated and len(messages) > 1:
            raise PromptError(f"{where}: a conversation needs a chat template, and the tokenizer's is absent or off")
        if sum(len(message["content"]) for message in messages) > MAX_LINE_BYTES:
            too_long += 1
            continue
        try:
            ids = tokenise(messages, tokenizer, templated, special=control_tokens == "special")
        # Half a surrogate pair, which JSON can write and UTF-8 cannot; a template that wants roles to alternate.
        except (UnicodeError, TemplateError, TypeError, PromptError) as error:
            raise PromptError(f"{where}: this prompt cannot be tokenised: {error}") from None
        if len(ids) > max_tokens:
            too_long += 1
        elif ids:
            token_ids.append([known[i] for i in ids])
            conversations.append(messages)
            teachers.append(teacher)
        else:
            empty += 1
    if not token_ids:
        raise PromptError(
            f"{path}: no usable prompt ({empty} empty, {too_long} of more than {max_tokens} tokens; prompts.max_tokens)"
        )
    texts = [messages[-1]["content"] for messages in conversations]
    return PromptSet(token_ids, texts, conversations, teachers, empty, too_long, answered)


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The indices of an epoch's prompts, in the order in which they are drawn."""
    if not shuffle:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def epoch_batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """An epoch's order in batches of `size` prompts; the last may have fewer."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] int64, padded on the left, and their mask [B, P] bool."""
    longest = max(len(ids) for ids in prompts)
    token_ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        token_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = True
    return token_ids, mask


def _conversation(record: Record, where: str, column: str | None) -> Conversation:
    """A record's messages, None in them left out, and its teacher. Raises `PromptError`."""
    key = column or next((name for name in COLUMNS if record.get(name) is not None), "")
    value, teacher = record.get(key), record.get("teacher")
    if isinstance(value, str) and key != "messages":
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value
    ):
        messages = [{name: part for name, part in message.items() if part is not None} for message in value]
    else:
        place = (
            f"the column {column!r}"
            if column
            else "a column `prompt` or `messages` (another is named by prompts.column)"
        )
        found = f"{key}: {value!r}" if key in record else f"the columns {', '.join(record)}"
        raise PromptError(
            f"{where}: expected in {place} text or a list of {{'role': ..., 'content': ...}} "
            f"with a role of {', '.join(ROLES)}; found {found:.120}"
        )
    if teacher is not None and not isinstance(teacher, str):
        raise PromptError(f"{where}: expected a teacher's name as text; found {teacher!s:.80}")
    return messages, teacher or None


def tokenise(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    templated: bool,
    *,
    special: bool = False,
    **template_arguments: Any,
) -> list[int]:
    """Token ids of a prompt; control tokens come from the template and, unless `special`, from nowhere else."""
    hidden: list[str] = []
    if special:
        safe = messages
    elif any(mark in message["content"] for message in messages for mark in MARKS):
        raise PromptError(f"it holds one of the private-use characters {MARKS[0]!r} and {MARKS[1]!r}; remove them")
    else:
        safe = [{**message, "content": _hide(message["content"], tokenizer, hidden)} for message in messages]
    if templated:
        text = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True, **template_arguments)
    else:
        text = safe[-1]["content"]
    # The template writes its own beginning-of-sequence token where the model wants one.
    ids = tokenizer(text.split(_mark(0))[0] if hidden else text, add_special_tokens=not templated)["input_ids"]
    for index, spelled in enumerate(hidden):
        ids += tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        rest = text.split(_mark(index))[1].split(_mark(index + 1))[0]
        ids += tokenizer(rest, add_special_tokens=False)["input_ids"]
    return ids


def _mark(index: int) -> str:
    return f"{MARKS[0]}{index}{MARKS[1]}"


def _hide(content: str, tokenizer: PreTrainedTokenizerBase, hidden: list[str]) -> str:
    """Replaces spelled-out control tokens by marks, appending what they hid to `hidden`."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    while True:
        found = [(content.find(token), -len(token), token) for token in special if token and token in content]
        if not found:
            return content
        token = min(found)[2]
        content = content.replace(token, _mark(len(hidden)), 1)
        hidden.append(token)
