"""Prompts from records, and the order in which they are drawn. `records.py` reads the files, `tokens.py` tokenises.

All prompts are tokenised before the first step and kept, so that their digest can guard a resumed run. The order is a
function of (seed, epoch) alone, so that such a run needs only its position.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.prompts.answers import Answer, AnswerOptions, AnswerTokeniser, WrittenAnswer, answer_of
from distill.prompts.conversations import Conversation, Message, Mixture, Tools, conversation_of, last_text, texts_in
from distill.prompts.records import BLANK, MAX_LINE_BYTES, PromptError, Record, Records, read
from distill.prompts.tokens import PromptTokeniser, Written


@dataclass(frozen=True)
class PromptSet:
    """Tokenised prompts, and how many lines of the file were left out."""

    token_ids: list[list[int]]
    texts: list[str]
    """What the user says last in each."""
    messages: list[list[Message]]
    """The conversations as the tokenizer was given them."""
    tools: list[Tools | None]
    """What each conversation was given beside; None where there is nothing."""
    teachers: list[str | Mixture | None]
    """What each record's `teacher` names, one or several with their shares; None where it has none."""
    records: list[Record]
    """The records of the prompts, each with all of its columns."""
    columns: tuple[str, ...]
    """Where in the records the prompts are from."""
    empty: int = 0
    """Blank lines, or records without text."""
    too_long: int = 0
    """Prompts above the token limit."""
    answered: int = 0
    """Conversations whose last message was the assistant's, which is no part of the prompt."""
    answers: list[Answer | None] = field(default_factory=list)
    """The written answer to each, None where there is none; empty where they were not asked for."""
    answers_apart: int = 0
    """Answers that the chat template does not write right after the prompt, and that are put there as they are."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def digest(self) -> str:
        """Tells one set of tokenised prompts, each with its teacher, from another."""
        return _sha256([self.token_ids, self.teachers] if any(self.teachers) else self.token_ids)

    @cached_property
    def answers_digest(self) -> str:
        """Tells one set of tokenised answers, each with its prompt, from another."""
        return _sha256([self.digest, self.answers])

    def column_digests(self, columns: Iterable[str]) -> dict[str, str]:
        """SHA-256 of what each of these columns holds in `records`; of a prompt's own column, of its token ids."""
        return {
            name: _sha256(self.token_ids if name in self.columns else [record.get(name) for record in self.records])
            for name in columns
        }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


BATCH, BATCH_CHARACTERS = 256, 2**20  # prompts, and how long they are together, that a tokenizer is given at once
UNUSABLE = (ValueError, TemplateError, TypeError, RecursionError)


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    chat_template: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    control_tokens: str = "text",
    max_tokens: int = 1024,
    answers: AnswerOptions | None = None,
    watched: Callable[[Records], Records] = iter,
) -> PromptSet:
    """Reads and tokenises the first `limit` records, or all, of a prompt file, a folder or a hub dataset.

    `column` holds the prompt: text, or a conversation whose last turn the student answers; absent, one of COLUMNS.
    The tokenizer's chat template is used unless `chat_template` is `never`. A conversation without a system message
    gets `system_prompt` as its own. `control_tokens` says what those are that a prompt spells out: `text`, or `special`
    tokens. `answers` asks for the records' written answers. `watched` is handed the records and hands them on, to show
    how far it is.
    Raises `PromptError` for what is missing, not UTF-8, malformed, or without a usable prompt.
    """
    tokeniser = _tokeniser(tokenizer, chat_template, chat_template_kwargs or {}, system_prompt, control_tokens)
    left_out: Counter[str] = Counter()
    records = watched(islice(read(path, whole=limit is None, streaming=streaming), limit))
    written = AnswerTokeniser(tokeniser, answers) if answers else None
    column = None if path.suffix == ".txt" else column
    prompts = _written(records, column, system_prompt, tokeniser, left_out, written, answers and answers.column)
    token_ids, used, said = [], [], []
    # Token ids are numbers met again and again: each is kept once.
    known = list(range(len(tokenizer)))
    for prompt, ids, answer in _tokenised(prompts, tokeniser, written):
        if len(ids) > max_tokens:
            left_out["too_long"] += 1
        elif ids:
            token_ids.append([known[i] for i in ids])
            used.append(prompt)
            said.append(answer and answer._replace(token_ids=[known[i] for i in answer.token_ids]))
        else:
            left_out["empty"] += 1
    if not token_ids:
        raise PromptError(
            f"{path}: no usable prompt ({left_out['empty']} empty, {left_out['too_long']} of more than {max_tokens} "
            f"tokens; prompts.max_tokens)"
        )
    conversations = [prompt.conversation for prompt in used]
    return PromptSet(
        token_ids,
        texts=[last_text(conversation.messages) for conversation in conversations],
        messages=[conversation.messages for conversation in conversations],
        tools=[conversation.tools for conversation in conversations],
        teachers=[conversation.teacher for conversation in conversations],
        records=[prompt.record for prompt in used],
        columns=tuple(sorted({conversation.column for conversation in conversations})),
        answers=said if written else [],
        answers_apart=written.apart if written else 0,
        **left_out,
    )


def _tokeniser(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    arguments: Mapping[str, Any],
    system_prompt: str | None,
    control_tokens: str,
) -> PromptTokeniser:
    templated = chat_template != "never" and tokenizer.chat_template is not None
    keys = {"prompts.system_prompt": system_prompt, "student.chat_template_kwargs": arguments}
    if not templated and (wanting := [key for key, value in keys.items() if value]):
        absent = "prompts.chat_template is never" if tokenizer.chat_template else "the student's tokenizer has none"
        raise PromptError(
            f"{' and '.join(wanting)}: needs a chat template, and {absent}: leave it out, or name the file of a "
            f"template as prompts.chat_template"
        )
    try:
        return PromptTokeniser(tokenizer, templated, special=control_tokens == "special", **arguments)
    except TypeError as error:  # one that has another meaning here
        raise PromptError(f"student.chat_template_kwargs: {error}") from None


class _Prompt(NamedTuple):
    where: str
    record: Record
    conversation: Conversation
    written: Written | None
    answer: WrittenAnswer | None


def _written(
    records: Records,
    column: str | None,
    system_prompt: str | None,
    tokeniser: PromptTokeniser,
    left_out: Counter[str],
    answers: AnswerTokeniser | None,
    answer_column: str | None,
) -> Iterator[_Prompt]:
    """The prompts of records, those that are not used counted in `left_out`, and what they answer. Raises
    `PromptError`."""
    for where, record in records:
        if record is None or record is BLANK:
            left_out["empty" if record is BLANK else "too_long"] += 1
            continue
        conversation = conversation_of(record, where, column)
        messages, tools = _prompt_of(conversation.messages), conversation.tools
        turns = conversation.messages[len(messages) :]
        left_out["answered"] += bool(turns)
        if not messages or not last_text(messages).strip():
            left_out["empty"] += 1
            continue
        if not tokeniser.templated and (len(messages) > 1 or tools):
            raise PromptError(
                f"{where}: a conversation needs a chat template, as tools do, and the tokenizer's is absent or off"
            )
        if system_prompt is not None and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": system_prompt}, *messages]
        said = answer_of(record, turns, where, answer_column) if answers else None
        try:
            if sum(map(len, texts_in([messages, tools]))) > MAX_LINE_BYTES:
                left_out["too_long"] += 1
                continue
            written = tokeniser.write(messages, tools)
            answer = said and answers.write(messages, said, tools)
        except UNUSABLE as error:
            raise _not_tokenised(where, error) from None
        yield _Prompt(where, record, conversation._replace(messages=messages), written, answer)


def _prompt_of(messages: list[Message]) -> list[Message]:
    """A conversation without the assistant's turns that it ends with."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def _tokenised(
    prompts: Iterator[_Prompt], tokeniser: PromptTokeniser, answers: AnswerTokeniser | None
) -> Iterator[tuple[_Prompt, list[int], Answer | None]]:
    """Each prompt with its ids and its answer, without the texts that these were made of."""
    for batch in _batches(prompts):
        encoded = _encoded(batch, tokeniser)
        found = _answers(batch, encoded, answers) if answers else [None] * len(batch)
        for prompt, ids, answer in zip(batch, encoded, found, strict=True):
            yield prompt._replace(written=None, answer=None), ids, answer


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


def _answers(batch: list[_Prompt], prompt_ids: Sequence[list[int]], tokeniser: AnswerTokeniser) -> list[Answer | None]:
    """What each of some prompts is answered."""
    answered = [(prompt, ids) for prompt, ids in zip(batch, prompt_ids, strict=True) if prompt.answer]
    try:
        found = iter(tokeniser.encode([prompt.answer for prompt, _ in answered], [ids for _, ids in answered]))
    except UNUSABLE:
        for prompt, ids in answered:  # to find which of them it was
            try:
                tokeniser.encode([prompt.answer], [ids])
            except UNUSABLE as error:
                raise _not_tokenised(prompt.where, error, "answer") from None
        raise
    return [next(found) if prompt.answer else None for prompt in batch]


def _not_tokenised(where: str, error: Exception, what: str = "prompt") -> PromptError:
    """Half a surrogate pair, which JSON can write and UTF-8 cannot; a template that wants roles to alternate."""
    return PromptError(f"{where}: this {what} cannot be tokenised: {error}")


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
