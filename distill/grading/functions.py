"""What a reference such as `rewards.py:score` or `exact_match:solution` names.

A file is read once, here: every process of a run has the function that the run began with, wherever the run stands by
then and whatever has become of the file.
"""

import difflib
import hashlib
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from distill.grading import builtin


class FunctionError(ValueError):
    """A function that cannot be used, with its reference, what was found, and what to do."""


@dataclass(frozen=True)
class GradingFunction:
    """A metric or task reward, `f(record, completion) -> number`."""

    reference: str
    """As it was written."""
    key: str
    """Of the configuration that names it, for messages."""
    name: str
    """What logs and figures call it."""
    sha256: str | None
    """Of the file's bytes; None for what is built in, as the trainer's version says it."""
    path: str
    source: bytes = field(repr=False)
    column: str | None = None
    """The record's column that a built-in one reads, where it was named."""
    library: str | None = None
    """What a built-in one imports."""


def resolve(reference: str, key: str) -> GradingFunction:
    """The function that a configuration's `key` names: `FILE.py:FUNCTION`, `NAME` or `NAME:COLUMN`.

    Raises `FunctionError`. What the file holds is seen when a process first loads it.
    """
    if ".py:" in reference:
        return _from_file(reference, key)
    name, colon, column = reference.partition(":")
    if name.endswith(".py"):
        raise FunctionError(f"{key}: {reference}: say which function of the file, as in {name}:score")
    if "/" in name or "." in name:
        raise FunctionError(f"{key}: {reference}: {name} is no .py file; a function of one's own is FILE.py:FUNCTION")
    if name not in builtin.BUILT_IN:
        near = difflib.get_close_matches(name, builtin.BUILT_IN, n=1)
        raise FunctionError(
            f"{key}: {reference}: there is no built-in function {name}{f'; {near[0]} is near' if near else ''}. "
            f"Built in are {', '.join(builtin.BUILT_IN)}; a function of one's own is FILE.py:FUNCTION"
        )
    if colon and not (column and "column" in inspect.signature(builtin.BUILT_IN[name]).parameters):
        raise FunctionError(f"{key}: {reference}: {f'{name} reads no column' if column else 'no column after the :'}")
    library = builtin.LIBRARIES.get(name)
    if library and importlib.util.find_spec(library) is None:
        install = "'distill-on-policy[math]'" if name == "math" else library
        raise FunctionError(f"{key}: {reference}: needs the package {library}: pip install {install}")
    path = Path(builtin.__file__)
    return GradingFunction(reference, key, name, None, str(path), path.read_bytes(), column or None, library)


def _from_file(reference: str, key: str) -> GradingFunction:
    name, _, function = reference.rpartition(":")
    if not name.endswith(".py") or not function.isidentifier():
        raise FunctionError(f"{key}: {reference}: expected FILE.py:FUNCTION; found {function!r} after the last :")
    path = Path(name).absolute()
    try:
        source = path.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = f"there is no such file in {Path.cwd()}" if missing else f"cannot be read: {error.strerror}"
        raise FunctionError(f"{key}: {reference}: {why}") from None
    return GradingFunction(reference, key, function, hashlib.sha256(source).hexdigest(), str(path), source)


def names(functions: Iterable[GradingFunction]) -> list[str]:
    """A name for each function's figures, no two the same: the second `score` is `score_2`."""
    own = [function.name for function in functions]
    given: list[str] = []
    for name in own:
        number, free = 1, name
        while free in given or (number > 1 and free in own):
            number += 1
            free = f"{name}_{number}"
        given.append(free)
    return given
