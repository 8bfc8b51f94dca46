"""The metrics and rewards that come with the trainer: what a record holds against what was written, 1.0 or 0.0.

A function's process loads this file by itself, as it loads a user's: it imports nothing of the house.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

MOST_DIGITS = 4300  # of an integer, that Python reads from text


def exact_match(record: dict[str, Any], completion: str, column: str = "answer") -> float:
    """Whether the completion is the answer, or one of them, but for white space around it."""
    return float(completion.strip() in _texts(record, column))


def contains(record: dict[str, Any], completion: str, column: str = "answer") -> float:
    """Whether the answer, or one of them, stands somewhere in the completion."""
    answers = _texts(record, column)
    if "" in answers:
        raise ValueError(f"the record's column {column!r} is empty, and every completion contains that")
    return float(any(answer in completion for answer in answers))


def regex(record: dict[str, Any], completion: str, column: str = "pattern") -> float:
    """Whether the pattern, or one of them, is found in the completion."""
    return float(any(re.search(str(pattern), completion) for pattern in _values(record, column)))


def json_valid(record: dict[str, Any], completion: str) -> float:
    """Whether the completion is JSON and nothing else: no fence around it, no NaN in it."""
    try:
        _json(completion)
    except ValueError:
        return 0.0
    return 1.0


def json_schema(record: dict[str, Any], completion: str, column: str = "schema") -> float:
    """Whether the completion is JSON that a schema holds for, by the draft that the schema names.

    Nothing is fetched: a reference to a schema elsewhere is an error.
    """
    schema, *others = _values(record, column)
    if others:
        raise ValueError(f"the record's column {column!r} holds {1 + len(others)} schemas, expected one")
    validator = _validator(schema if isinstance(schema, str) else json.dumps(schema))
    try:
        value = _json(completion)
    except ValueError:
        return 0.0
    return float(validator.is_valid(value))


def math(record: dict[str, Any], completion: str, column: str = "answer") -> float:
    """Whether the completion's last answer is mathematically the same as the record's, or as one of them.

    Of math-verify; an answer without $ or \\boxed is taken as if it stood in a box.
    """
    from math_verify import parse, verify

    golds = [_gold(text) for text in _texts(record, column)]
    found = parse(completion)
    return float(any(verify(gold, found) for gold in golds))


BUILT_IN = {f.__name__: f for f in (exact_match, contains, regex, json_valid, json_schema, math)}
LIBRARIES = {"json_schema": "jsonschema", "math": "math_verify"}


def _values(record: Mapping[str, Any], column: str) -> list[Any]:
    """What stands in a record's column, each item of a list."""
    if column not in record:
        raise ValueError(f"the record has no column {column!r}; it has {', '.join(map(str, record)) or 'none'}")
    values = list(found) if isinstance(found := record[column], list | tuple) else [found]
    if not values or any(value is None for value in values):
        raise ValueError(f"the record's column {column!r} holds {found!r}, and no answer")
    return values


def _texts(record: Mapping[str, Any], column: str) -> list[str]:
    return [str(value).strip() for value in _values(record, column)]


def _json(text: str) -> Any:
    """The value of strict JSON; ValueError where it is none."""
    try:
        return json.loads(text.strip(), parse_constant=_refuse, parse_int=_integer)
    except RecursionError:
        raise ValueError("deeper than can be read") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < MOST_DIGITS else float(digits)


@lru_cache(maxsize=256)  # the rollouts of one prompt have one schema
def _validator(text: str) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for
    from jsonschema_specifications import REGISTRY  # the drafts themselves; it fetches nothing

    schema = json.loads(text)
    kind = validator_for(schema, default=Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=REGISTRY)


@lru_cache(maxsize=1024)  # the rollouts of one prompt have one answer
def _gold(text: str) -> Any:
    from math_verify import parse

    gold = parse(text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}")
    if not gold:
        raise ValueError(f"math-verify finds no answer in the record's {text[:80]!r}")
    return gold
