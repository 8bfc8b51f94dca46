"""Whether two tokenizers are one: the same ids for the same tokens, and every text split alike.

Needs no model's weights, so that what does not fit is said before any are read. Left out on purpose: a proof. Two
backends of the same settings are one; where the settings differ, a difference is looked for in texts.
"""

import json
from collections.abc import Iterator, Set

from transformers import PreTrainedTokenizerBase

from distill.models.sources import ModelError

SPLITTING = ("model", "normalizer", "pre_tokenizer", "added_tokens")
"""What of a backend's settings decides how a text is split."""
TOGETHER = 64  # short texts that are tokenised as one, a line each: a call for each takes six times as long
SHOWN = 8  # tokens of a text that a message shows
TEXTS = (
    *(
        "The quick brown fox's 12 jumps, isn't it?",
        "THE NEW YORK TIMES",
        "antidisestablishmentarianism",
        "iPhone OpenAI",
    ),
    *("Ça déjà vu, naïve façade", "Straße über Größe", "mañana, ¿qué?", "İstanbul ışık", "Việt Nam đất nước"),
    *("Привет, мир!", "Ελληνικά", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "მშვიდობა", "አማርኛ"),
    *(
        "你好，世界。",
        "こんにちは世界",
        "カタカナ ｶﾀｶﾅ",
        "안녕하세요 세계",
        "e\u0301 o\u0308 a\u030a",
        "\u1112\u1161\u11ab",
        "ﬁ ½ ² Ａ １",
    ),
    *("0 12 345 6789 1234567", "3.14159 1,000,000 -5e-10 0x1F", "2024-01-31T23:59:59Z", "50% $100 €20 №7 #1"),
    *(
        " leading",
        "trailing ",
        "two  three   four    ",
        "\ttab\t\ttabs",
        "a\nb\n\nc\n\n\nd",
        "a\r\nb",
        " \n \n",
        "nbsp\u00a0zwj\u200d",
    ),
    *("def f(x):\n    return x**2  # note", "if (a != b) { c[i]++; }", "https://example.org/a?b=c&d=%20", "x_y-z.w@v"),
    *('<p class="a">&amp;</p>', "\\frac{a}{b} $x^2$", '{"a": [1, null]}', "...!!!??? --- ***", "“quoted” ‘it’s’ – —"),
    *("😀😃 👍🏽 👨‍👩‍👧 🇩🇪 ❤️", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "∀x∈ℝ ∑∫≠≤", "we'll they'RE I'D", "aaaaaaaaaaaaaaaa", "================"),
)
"""Languages, scripts, digits, white space, code, symbols, and what normalisers change."""


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str = "teacher") -> int:
    """Checks that both are one tokenizer, ids that only one has aside; returns the number V of shared real tokens.

    `name` is what a message calls the teacher. Raises `ModelError` when an id means different tokens to the two, or
    with the first text found that they split differently.
    """
    written = _written(student), _written(teacher)
    own = student.get_vocab()
    if written[0] is not None and written[0] == written[1]:
        return max(own.values()) + 1
    other = teacher.get_vocab()
    vocab_size = min(max(own.values()), max(other.values())) + 1
    own_tokens = {index: token for token, index in own.items() if index < vocab_size}
    other_tokens = {index: token for token, index in other.items() if index < vocab_size}
    differing = [i for i in range(vocab_size) if own_tokens.get(i) != other_tokens.get(i)]
    if differing:
        shown = "; ".join(f"{i}: {own_tokens.get(i)!r} / {other_tokens.get(i)!r}" for i in differing[:3])
        raise ModelError(
            f"student and {name} have different vocabularies: {len(differing)} of {vocab_size} ids stand for "
            f"different tokens ({shown}). Distillation on tokens needs one vocabulary: choose models of one family"
        )
    for groups in _probes(student, teacher, *written):
        if (text := _split_differently(groups, student, teacher)) is not None:
            raise ModelError(
                f"student and {name} split text differently: {text[:80]!r} is {_shown(text, student, teacher)} to the "
                f"student's tokenizer, and {_shown(text, teacher, student)} to the {name}'s. Distillation on tokens "
                f"needs one tokenizer: choose models of one family and generation, or give the student the files of "
                f"the teacher's tokenizer, if its embeddings have a row for every token and were trained with it"
            )
    return vocab_size


def _written(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A tokenizer's settings as JSON; None for one in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


def _probes(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, written: str | None, other_written: str | None
) -> Iterator[list[list[str]]]:
    """Lists of groups of texts to try, the most telling first; a group's are tokenised together.

    None at all where the settings that decide are the same. A tokenizer in Python is too slow for what both have.
    """
    in_python = written is None or other_written is None
    settings = {} if in_python else json.loads(written), {} if in_python else json.loads(other_written)
    differing = [key for key in SPLITTING if settings[0].get(key) != settings[1].get(key)]
    if not differing and not in_python:
        return
    added = sorted({*student.get_added_vocab(), *teacher.get_added_vocab()})
    yield _grouped([text for token in added for text in (token, f"a {token} b", f"a{token}b")])
    yield [[text] for text in TEXTS]
    own, other = student.get_vocab(), teacher.get_vocab()
    yield _grouped(_texts(own.keys() - other.keys(), own, student))
    yield _grouped(_texts(other.keys() - own.keys(), other, teacher))
    if "model" in differing:
        yield _grouped(_texts(own.keys() & other.keys(), own, student))
    characters = (*range(0x20, 0xD800), *range(0xF900, 0xFFFE), *range(0x1F300, 0x1FB00))
    yield _grouped([chr(code) for code in characters])


def _texts(tokens: Set[str], ids: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token stands for, in the order of their ids."""
    ordered = sorted(tokens, key=ids.__getitem__)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer.convert_tokens_to_string([token]) for token in ordered]
    decoded = backend.decode_batch([[ids[token]] for token in ordered], skip_special_tokens=False)
    # A decoder of these drops the space before a text's first word.
    return [token.replace("▁", " ") if "▁" in token else text for token, text in zip(ordered, decoded, strict=True)]


def _grouped(texts: list[str]) -> list[list[str]]:
    return [texts[i : i + TOGETHER] for i in range(0, len(texts), TOGETHER)]


def _split_differently(
    groups: list[list[str]], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> str | None:
    """The first text of the groups that the two split differently; None where there is none."""
    joined = ["\n".join(texts) for texts in groups]
    pairs = zip(_ids(student, joined), _ids(teacher, joined), strict=True)
    for index, (own, other) in enumerate(pairs):
        if own == other:
            continue
        texts = groups[index] if len(groups[index]) > 1 else []
        apart = zip(texts, _ids(student, texts), _ids(teacher, texts), strict=True)
        return next((text for text, own, other in apart if own != other), joined[index])
    return None


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    options = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
    return tokenizer(texts, return_attention_mask=False, **options)["input_ids"] if texts else []


def _shown(text: str, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """How a tokenizer splits a text, from where another splits it differently if it is long."""
    (ids,), (theirs,) = _ids(tokenizer, [text]), _ids(other, [text])
    same = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), min(len(ids), len(theirs)))
    first = same if len(ids) > SHOWN else 0
    part = ids[first : first + SHOWN]
    before, after = "... " * (first > 0), " ..." * (first + len(part) < len(ids))
    return f"{before}{tokenizer.convert_ids_to_tokens(part)}{after} (ids {', '.join(map(str, part))})"
