"""The tokens that a run says end a completion, by name or id."""

import difflib
import math
from collections.abc import Iterable, Sequence

import yaml
from transformers import PreTrainedTokenizerBase

from distill.models.sources import ModelError


def named_ids(tokens: Sequence[str | int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `rollout.stop_ids`, sorted. Raises `ModelError` for what `tokenizer` does not have."""
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    for token in tokens:
        if isinstance(token, str) and token not in vocabulary:
            raise ModelError(
                f"rollout.stop_ids: the student's tokenizer has no token {token!r}{_nearest(token, tokenizer)}"
            )
        if not isinstance(token, str) and token not in known:
            raise ModelError(
                f"rollout.stop_ids: the student's tokenizer has no token of id {token}; its ids are 0 to {max(known)}"
            )
    return sorted({vocabulary[token] if isinstance(token, str) else token for token in tokens})


def _nearest(token: str, tokenizer: PreTrainedTokenizerBase) -> str:
    added = [known.content for known in tokenizer.added_tokens_decoder.values()]
    found = difflib.get_close_matches(token, tokenizer.get_vocab(), n=1)
    found = found or difflib.get_close_matches(token, added, n=1, cutoff=0)
    return f"; the nearest that it has is {found[0]!r}" if found else ""


def stops_line(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes these of the tokenizer's ids end a completion: a key and its value, for YAML and the command line."""
    names = {index: name for name, index in tokenizer.get_vocab().items()}
    listed = [names[index] for index in sorted(ids) if index in names]
    plain = all(name.isprintable() for name in listed)  # others are written as escapes
    flow = {"default_flow_style": True, "default_style": '"', "allow_unicode": plain}
    return f"rollout.stop_ids: {yaml.safe_dump(listed, width=math.inf, **flow).strip()}"
