"""Token ids of prompts: the chat template, control tokens that a prompt spells out, and few calls of the tokenizer.

Control tokens come from the template. What a prompt spells out (`<|im_end|>`) stays text: it is marked before the
template sees it, and tokenised apart from what stands around it.
"""

import re
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from distill.prompts.records import PromptError

Message = dict[str, str]

MARKS = "\U000f0d15", "\U000f0d16"  # private-use characters: no template gives them a meaning
PROBE = "a few words"
MARK = re.compile(f"{MARKS[0]}([0-9]+){MARKS[1]}")


class Written(NamedTuple):
    """A prompt as the template writes it, cut where control tokens are spelled out."""

    pieces: list[str]
    """One more than there are in `spelled`."""
    spelled: list[str]
    """What stands between them, and is text."""


def tokenise(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    templated: bool,
    *,
    special: bool = False,
    **template_arguments: Any,
) -> list[int]:
    """Token ids of a prompt; control tokens come from the template and, unless `special`, from nowhere else."""
    return encode([write(messages, tokenizer, templated, special=special, **template_arguments)], tokenizer, templated)[
        0
    ]


def write(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    templated: bool,
    *,
    special: bool = False,
    **template_arguments: Any,
) -> Written:
    """A prompt in the chat template, or its last message where it is not `templated`. Raises `PromptError`."""
    hidden: list[str] = []
    ways = _ways(tokenizer)
    if special:
        safe = messages
    elif any(mark in message["content"] for message in messages for mark in MARKS):
        raise PromptError(f"it holds one of the private-use characters {MARKS[0]!r} and {MARKS[1]!r}; remove them")
    else:
        safe = [{**message, "content": ways.control.hide(message["content"], hidden)} for message in messages]
    if templated:
        given = _in_parts(safe) if ways.in_parts else safe
        text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True, **template_arguments)
    else:
        text = safe[-1]["content"]
    pieces = MARK.split(text) if hidden else [text]
    return Written(pieces[::2], [hidden[int(index)] for index in pieces[1::2]])


def encode(prompts: Sequence[Written], tokenizer: PreTrainedTokenizerBase, templated: bool) -> list[list[int]]:
    """Token ids of each prompt: the tokenizer is called once for all beginnings, once for what is spelled out, and once
    for what stands between.
    """
    # The template writes its own beginning-of-sequence token where the model wants one.
    ids = _called(tokenizer, [prompt.pieces[0] for prompt in prompts], add_special_tokens=not templated)
    spelled = [text for prompt in prompts for text in prompt.spelled]
    between = [text for prompt in prompts for text in prompt.pieces[1:]]
    spelled_ids = iter(_called(tokenizer, spelled, add_special_tokens=False, split_special_tokens=True))
    between_ids = iter(_called(tokenizer, between, add_special_tokens=False))
    for prompt, found in zip(prompts, ids, strict=True):
        for _ in prompt.spelled:
            found += next(spelled_ids) + next(between_ids)
    return ids


def _called(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> list[list[int]]:
    return tokenizer(texts, **options)["input_ids"] if texts else []


class ControlTokens:
    """Finds a tokenizer's special tokens in a text: the earliest first, and of those that begin there the longest."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = frozenset(filter(None, tokens))
        self._lengths = sorted({len(token) for token in self._tokens}, reverse=True)
        # Some tokenizers have thousands, of a few beginnings: a text is searched for those.
        self._begin = re.compile("|".join(sorted({re.escape(token[:2]) for token in self._tokens})) or r"(?!)")

    def hide(self, content: str, hidden: list[str]) -> str:
        """Replaces spelled-out control tokens by marks, appending what they hid to `hidden`."""
        kept, done, begin = [], 0, self._begin.search(content)
        while begin:
            at = begin.start()
            token = next((t for n in self._lengths if (t := content[at : at + n]) in self._tokens), None)
            if token:
                kept += [content[done:at], f"{MARKS[0]}{len(hidden)}{MARKS[1]}"]
                hidden.append(token)
                done = at + len(token)
            begin = self._begin.search(content, done if token else at + 1)
        return "".join([*kept, content[done:]]) if kept else content


class Ways(NamedTuple):
    """What is found out of a tokenizer once: to list thousands of tokens takes longer than to tokenise a prompt."""

    control: ControlTokens
    in_parts: bool
    """Whether its template leaves out text that is not a list of parts, as some do for models of pictures."""


_WAYS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, Ways]] = weakref.WeakKeyDictionary()


def _ways(tokenizer: PreTrainedTokenizerBase) -> Ways:
    known = len(tokenizer), tokenizer.chat_template
    before, found = _WAYS.get(tokenizer, (None, None))
    if before != known:
        control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        messages = [{"role": "user", "content": PROBE}]
        in_parts = not _holds(tokenizer, messages) and _holds(tokenizer, _in_parts(messages))
        found = Ways(ControlTokens(control), in_parts)
        _WAYS[tokenizer] = known, found
    return found


def _in_parts(messages: list[Message]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _holds(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> bool:
    """Whether the template writes the text of `messages`."""
    try:
        return PROBE in tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # a template that wants more than this says so of a prompt
        return False
