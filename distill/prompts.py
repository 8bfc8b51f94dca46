"""Prompt files, the chat template, and the order in which prompts are drawn.

The order is a function of (seed, epoch) alone, so that a resumed run needs only its position. Text that happens to
spell a control token (`<|im_end|>`) stays text.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Conversation = tuple[list[Message], str | None]  # and the name of its teacher


class PromptError(ValueError):
    """A prompt file that cannot be used, with the line and what to do."""


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

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def digest(self) -> str:
        """Tells one set of tokenised prompts, each with its teacher, from another."""
        told = [self.token_ids, self.teachers] if any(self.teachers) else self.token_ids
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


ROLES = ("system", "user", "assistant", "tool")
MAX_LINE_BYTES, MAX_FILE_BYTES = 2**22, 2**30
MARKS = "\U000f0d15", "\U000f0d16"  # private-use characters: no template gives them a meaning


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str = "auto",
    control_tokens: str = "text",
    max_tokens: int = 1024,
) -> PromptSet:
    """Reads and tokenises a prompt file: `.txt`, one prompt a line, or `.jsonl`, a `prompt` or `messages` each.

    `control_tokens` says what those are that a prompt spells out: `text`, or `special` tokens.
    Raises `PromptError` for a file that is missing, not UTF-8, malformed, or without a usable prompt.
    """
    templated = chat_template == "auto" and tokenizer.chat_template is not None
    token_ids, conversations, teachers, empty, too_long = [], [], [], 0, 0
    for where, conversation in _read(path):
        if conversation is None:
            too_long += 1
            continue
        messages, teacher = conversation
        if not messages or not messages[-1]["content"].strip():
            empty += 1
            continue
        if not templated and len(messages) > 1:
            raise PromptError(f"{where}: a conversation needs a chat template, and the tokenizer's is absent or off")
        try:
            ids = tokenise(messages, tokenizer, templated, special=control_tokens == "special")
        # Half a surrogate pair, which JSON can write and UTF-8 cannot; a template that wants roles to alternate.
        except (UnicodeError, TemplateError, TypeError, PromptError) as error:
            raise PromptError(f"{where}: this prompt cannot be tokenised: {error}") from None
        if len(ids) > max_tokens:
            too_long += 1
        elif ids:
            token_ids.append(ids)
            conversations.append(messages)
            teachers.append(teacher)
        else:
            empty += 1
    if not token_ids:
        raise PromptError(
            f"{path}: no usable prompt ({empty} empty, {too_long} of more than {max_tokens} tokens; prompts.max_tokens)"
        )
    texts = [messages[-1]["content"] for messages in conversations]
    return PromptSet(token_ids, texts, conversations, teachers, empty, too_long)


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The indices of an epoch's prompts, in the order in which they are drawn."""
    if not shuffle:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] int64, padded on the left, and their mask [B, P] bool."""
    longest = max(len(ids) for ids in prompts)
    token_ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        token_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = True
    return token_ids, mask


def _read(path: Path) -> Iterator[tuple[str, Conversation | None]]:
    """Each record's place and content; no messages for a blank one, None for one longer than any prompt."""
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptError(f"{path}: a prompt file is .txt (one prompt a line) or .jsonl (one JSON object a line)")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PromptError(
                f"{path}: {size / 2**30:.1f} GiB, and at most {MAX_FILE_BYTES / 2**30:.0f} are read: take a part of it"
            )
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file, path), 1):
                where = f"{path}, line {number}"
                if line is None:
                    yield where, None
                elif not line.strip():
                    yield where, ([], None)
                elif path.suffix == ".txt":
                    yield where, ([{"role": "user", "content": line.strip()}], None)
                else:
                    yield where, _conversation(line, where)
    except FileNotFoundError:
        raise PromptError(f"{path}: there is no such file") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(file: BinaryIO, path: Path) -> Iterator[str | None]:
    """Lines without their ends, None for one past MAX_LINE_BYTES, so that memory never holds more than one.

    Lines end at line feeds only: other characters at which Python splits may stand inside a prompt.
    """
    read = 0
    while content := file.readline(MAX_LINE_BYTES):
        too_long = len(content) == MAX_LINE_BYTES and not content.endswith(b"\n")
        try:
            # A character may be cut in two at the end of what was read of a line that is too long.
            line = content[: -4 if too_long else None].decode("utf-8" if read else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise PromptError(f"{path}: not UTF-8 text (byte {read + error.start}): save it as UTF-8") from None
        if b"\0" in content:
            raise PromptError(f"{path}: byte {read + content.index(0)} is NUL, so this is no text file")
        read += len(content)
        while too_long and content and not content.endswith(b"\n"):
            content = file.readline(MAX_LINE_BYTES)
            read += len(content)
        yield None if too_long else line.removesuffix("\n").removesuffix("\r")
    if not read:
        yield ""


def _conversation(line: str, where: str) -> Conversation:
    try:
        record: Any = json.loads(line)
    # ValueError also for a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not valid JSON: {error}") from None
    teacher = record.get("teacher") if isinstance(record, dict) else None
    if teacher is not None and not (isinstance(teacher, str) and teacher):
        raise PromptError(f"{where}: expected a teacher's name as text; found {teacher!r:.80}")
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": record["prompt"]}], teacher
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages
    ):
        raise PromptError(
            f'{where}: expected {{"prompt": "text"}} or {{"messages": [{{"role": ..., "content": ...}}]}} '
            f"with a role of {', '.join(ROLES)}; found {line[:80]!r}"
        )
    return messages, teacher


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
