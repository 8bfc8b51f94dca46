"""Prompts from records, and the order in which they are drawn. `records.py` reads the files, `tokens.py` tokenises.

All prompts are tokenised before the first step and kept, so that their digest can guard a resumed run. The order is a
function of (seed, epoch) alone, so that such a run needs only its position.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.prompts.records import BLANK, MAX_LINE_BYTES, PromptError, Record, Records, read
from distill.prompts.tokens import Message, PromptTokeniser, Written

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
BATCH, BATCH_CHARACTERS = 256, 2**20  # prompts, and how long they are together, that a tokenizer is given at once
UNUSABLE = (UnicodeError, TemplateError, TypeError, PromptError)


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
    watched: Callable[[Records], Records] = iter,
) -> PromptSet:
    """Reads and tokenises the first `limit` records, or all, of a prompt file, a folder or a hub dataset.

    `column` holds the prompt: text, or a conversation whose last turn the student answers; absent, one of COLUMNS.
    `control_tokens` says what those are that a prompt spells out: `text`, or `special` tokens.
    `watched` is handed the records and hands them on, to show how far it is.
    Raises `PromptError` for what is missing, not UTF-8, malformed, or without a usable prompt.
    """
    templated = chat_template == "auto" and tokenizer.chat_template is not None
    column = None if path.suffix == ".txt" else column
    columns = (column or COLUMNS[0], *COLUMNS, "teacher")
    left_out: Counter[str] = Counter()
    records = watched(islice(read(path, columns, whole=limit is None, streaming=streaming), limit))
    tokeniser = PromptTokeniser(tokenizer, templated, special=control_tokens == "special")
    prompts = _written(records, column, tokeniser, left_out)
    token_ids, conversations, teachers = [], [], []
    # Token ids are numbers met again and again: each is kept once.
    known = list(range(len(tokenizer)))
    for batch in _batches(prompts):
        for prompt, ids in zip(batch, _encoded(batch, tokeniser), strict=True):
            if len(ids) > max_tokens:
                left_out["too_long"] += 1
            elif ids:
                token_ids.append([known[i] for i in ids])
                conversations.append(prompt.messages)
                teachers.append(prompt.teacher)
            else:
                left_out["empty"] += 1
    if not token_ids:
        raise PromptError(
            f"{path}: no usable prompt ({left_out['empty']} empty, {left_out['too_long']} of more than {max_tokens} "
            f"tokens; prompts.max_tokens)"
        )
    texts = [messages[-1]["content"] for messages in conversations]
    return PromptSet(token_ids, texts, conversations, teachers, **left_out)


class _Prompt(NamedTuple):
    where: str
    messages: list[Message]
    teacher: str | None
    written: Written


def _written(
    records: Records, column: str | None, tokeniser: PromptTokeniser, left_out: Counter[str]
) -> Iterator[_Prompt]:
    """The prompts of records, those that are not used counted in `left_out`. Raises `PromptError`."""
    for where, record in records:
        if record is None:
            left_out["too_long"] += 1
            continue
        messages, teacher = ([], None) if record is BLANK else _conversation(record, where, column)
        answers = 0
        while messages and messages[-1]["role"] == "assistant":
            messages, answers = messages[:-1], 1
        left_out["answered"] += answers
        if not messages or not messages[-1]["content"].strip():
            left_out["empty"] += 1
            continue
        if not tokeniser.templated and len(messages) > 1:
            raise PromptError(f"{where}: a conversation needs a chat template, and the tokenizer's is absent or off")
        if sum(len(message["content"]) for message in messages) > MAX_LINE_BYTES:
            left_out["too_long"] += 1
            continue
        try:
            written = tokeniser.write(messages)
        except UNUSABLE as error:
            raise _not_tokenised(where, error) from None
        yield _Prompt(where, messages, teacher, written)


def _batches(prompts: Iterator[_Prompt]) -> Iterator[list[_Prompt]]:
    """Some at a time. Of several faults the first is told: what comes before an error is handed out before it."""
    batch, characters = [], 0
    try:
        for prompt in prompts:
            batch.append(prompt)
            characters += sum(map(len, prompt.written.pieces))
            if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except PromptError:
        yield batch
        raise
    yield batch


def _encoded(batch: list[_Prompt], tokeniser: PromptTokeniser) -> list[list[int]]:
    try:
        return tokeniser.encode([prompt.written for prompt in batch])
    except UNUSABLE:
        found = []
    for prompt in batch:  # to find which of them it was
        try:
            found += tokeniser.encode([prompt.written])
        except UNUSABLE as error:
            raise _not_tokenised(prompt.where, error) from None
    return found


def _not_tokenised(where: str, error: Exception) -> PromptError:
    """Half a surrogate pair, which JSON can write and UTF-8 cannot; a template that wants roles to alternate."""
    return PromptError(f"{where}: this prompt cannot be tokenised: {error}")


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
