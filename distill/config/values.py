"""The checked kinds of values that the sections of the configuration are made of, and what every section is."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _no_boolean(value: Any) -> Any:
    # YAML's bare `yes` is a boolean, and Python takes a boolean for a number.
    if isinstance(value, bool):
        raise ValueError("expected a number, not a truth value")
    return value


Integer = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Positive = Annotated[Integer, Field(ge=1)]


def no_nul(value: Any) -> Any:
    if "\0" in str(value):
        raise ValueError("expected text without NUL characters")
    return value


FilePath = Annotated[Path, AfterValidator(no_nul)]
Reference = Annotated[str, Field(min_length=1), AfterValidator(no_nul)]


def _only_json(value: Any) -> Any:
    """Checkpoints keep it as JSON, which has no other values and no keys but text."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError("text, finite numbers, true, false, null, lists, and mappings whose keys are text")
    return value


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_only_json)]


def written_as(pattern: str, expected: str) -> AfterValidator:
    """Text that `pattern` matches as a whole; `expected` says in words what that is."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


Url = Annotated[
    str, written_as(r"https?://[^\s/?#@]+(/[^\s?#]*)?", "the URL of a server without a query, as http://localhost:8000")
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


def _as_id(value: Any) -> Any:
    # The command line hands the entries of a list on as text.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


TokenName = Annotated[Integer | str, BeforeValidator(_as_id)]
"""A token by its name or its id; what is written in digits is an id."""
