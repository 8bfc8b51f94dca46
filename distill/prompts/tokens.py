"""Token ids of prompts: the chat template, control tokens that a prompt spells out, and few calls of the tokenizer.

Control tokens come from the template. What a prompt spells out (`<|im_end|>`) stays text: it is marked before the
template sees it, and tokenised apart from what stands around it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from distill.prompts.conversations import Message, Tools, last_text, texts_in, with_texts
from distill.prompts.records import PromptError

MARKS = "\U000f0d15", "\U000f0d16"  # private-use characters: no template gives them a meaning
ESCAPED = tuple(json.dumps(mark).strip('"') for mark in MARKS)  # as a template's `tojson(ensure_ascii=true)` has them
PROBE = "a few words"
MARK = re.compile("(?:{}|{})([0-9]+)(?:{}|{})".format(*map(re.escape, (MARKS[0], ESCAPED[0], MARKS[1], ESCAPED[1]))))


class Written(NamedTuple):
    """A prompt as the template writes it, cut where control tokens are spelled out."""

    pieces: list[str]
    """One more than there are in `spelled`."""
    spelled: list[str]
    """What stands between them, and is text."""


class PromptTokeniser:
    """Tokenises prompts; what takes longer than that to find out of a tokenizer is found out here, once."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, templated: bool, *, special: bool = False, **template_arguments: Any
    ) -> None:
        """Without `templated`, a prompt is its last message. `special` makes control tokens of those spelled out."""
        self._tokenizer, self.templated, self._arguments = tokenizer, templated, template_arguments
        added = () if special else tokenizer.added_tokens_decoder.values()
        self._control = None if special else ControlTokens([token.content for token in added if token.special])
        probe = [{"role": "user", "content": PROBE}]
        # Templates for models of pictures may leave out a text that is no list of parts.
        self._in_parts = False
        self._in_parts = templated and not self._holds(probe) and self._holds(_in_parts(probe))

    def __call__(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Token ids of one prompt. Raises `PromptError`, and what a template or a tokenizer raises."""
        return self.encode([self.write(messages, tools)])[0]

    def write(self, messages: Sequence[Message], tools: Tools | None = None) -> Written:
        """A prompt in the chat template, which gets messages and tools as they are, with texts marked in any depth."""
        messages, tools, hidden = self._marked(messages, tools)
        return _cut(self._text(messages, tools), hidden)

    def write_answer(
        self, messages: Sequence[Message], answer: Message, tools: Tools | None = None
    ) -> tuple[Written, Written, bool]:
        """A prompt with its answer, what stands after the prompt, and whether the template writes that there; where it
        does not, the answer is taken as it is.
        """
        marked, tools, hidden = self._marked([*messages, answer], tools)
        prompt, said = self._text(marked[:-1], tools), last_text(marked)
        whole = self._rendered(marked, tools, answered=True) if self.templated else prompt + said
        follows = whole.startswith(prompt)
        return _cut(whole, hidden), _cut(whole.removeprefix(prompt) if follows else said, hidden), follows

    def _marked(
        self, messages: Sequence[Message], tools: Tools | None
    ) -> tuple[Sequence[Message], Tools | None, list[str]]:
        """Both with marks in the place of control tokens, and what these hide: of the tools first, so that a message
        more changes no other's mark."""
        hidden: list[str] = []
        if self._control is not None:
            if any(mark in text for text in texts_in([*messages, tools]) for mark in (*MARKS, *ESCAPED)):
                raise PromptError(
                    f"it holds one of the private-use characters {MARKS[0]!r} and {MARKS[1]!r}; remove them"
                )
            tools = self._hidden(tools, hidden)
            messages = [self._hidden(message, hidden) | {"role": message["role"]} for message in messages]
        return messages, tools, hidden

    def _text(self, messages: Sequence[Message], tools: Tools | None) -> str:
        return self._rendered(messages, tools) if self.templated else last_text(messages)

    def encode(self, prompts: Sequence[Written], *, begins: bool = True) -> list[list[int]]:
        """Token ids of each: the tokenizer is called once for all beginnings, once for what is spelled out, and once
        for what stands between. `begins`: nothing comes before them.
        """
        # The template writes its own beginning-of-sequence token where the model wants one.
        special = begins and not self.templated
        ids = self._called([prompt.pieces[0] for prompt in prompts], add_special_tokens=special)
        spelled = [text for prompt in prompts for text in prompt.spelled]
        between = [text for prompt in prompts for text in prompt.pieces[1:]]
        spelled_ids = iter(self._called(spelled, add_special_tokens=False, split_special_tokens=True))
        between_ids = iter(self._called(between, add_special_tokens=False))
        for prompt, found in zip(prompts, ids, strict=True):
            for _ in prompt.spelled:
                found += next(spelled_ids) + next(between_ids)
        return ids

    def _called(self, texts: list[str], **options: Any) -> list[list[int]]:
        return self._tokenizer(texts, **options)["input_ids"] if texts else []

    def _hidden(self, value: Any, hidden: list[str]) -> Any:
        return with_texts(value, lambda text: self._control.hide(text, hidden))

    def _rendered(self, messages: Sequence[Message], tools: Tools | None = None, *, answered: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            _in_parts(messages) if self._in_parts else list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=not answered,
            **self._arguments,
        )

    def _holds(self, messages: list[Message]) -> bool:
        """Whether the template writes the text of `messages`."""
        try:
            return PROBE in self._rendered(messages)
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
        ):  # a template that wants more than this says so of a prompt
            return False


def tokenise(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    templated: bool,
    *,
    special: bool = False,
    **template_arguments: Any,
) -> list[int]:
    """Token ids of one prompt; control tokens come from the template and, unless `special`, from nowhere else."""
    return PromptTokeniser(tokenizer, templated, special=special, **template_arguments)(messages)


def read_template(path: Path) -> str:
    """The chat template that a file holds. Raises `PromptError` for one that cannot be read, or is not Jinja."""
    try:
        text = path.read_text(encoding="utf-8")
        render_jinja_template([], chat_template=text)  # renders nothing, in the dialect of chat templates
    except FileNotFoundError:
        raise PromptError(f"prompts.chat_template: {path}: there is no such file") from None
    except OSError as error:
        raise PromptError(f"prompts.chat_template: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PromptError(
            f"prompts.chat_template: {path}: not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    except TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise PromptError(f"prompts.chat_template: {path}{line}: not a valid Jinja template: {error.message}") from None
    return text


def _cut(text: str, hidden: Sequence[str]) -> Written:
    """A marked text, cut where a mark hides something."""
    pieces = MARK.split(text) if hidden else [text]
    return Written(pieces[::2], [hidden[int(index)] for index in pieces[1::2]])


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [
        message if (text := message.get("content")) is None else message | {"content": [{"type": "text", "text": text}]}
        for message in messages
    ]


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
