"""Writes `docs/configuration.md`, every configuration key from the code: `make docs`."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from distill.config import Config
from distill.config.config import inner_section
from distill.config.values import Section

HEADER = """# Configuration

Every key, from the code. Give them in a YAML file, or on the command line as `--section.key VALUE`;
`python -m distill.train --help` prints the same. Keys without a default must be given.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join([HEADER, *(line for name, field in Config.model_fields.items() for line in _section(name, field))])


def _section(name: str, field: FieldInfo) -> Iterator[str]:
    yield f"## `{name}`\n"
    if inner := listed_section(field.annotation):
        yield f"{' '.join(field.description.split())} A list; each entry has these keys:\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    yield from _rows(f"{name}[]" if inner else name, inner or field.annotation)
    yield ""


def _rows(name: str, section: type[Section]) -> Iterator[str]:
    for key, of_key in section.model_fields.items():
        default = "" if of_key.is_required() else f"`{_written(of_key.get_default(call_default_factory=True))}`"
        meaning = " ".join((of_key.description or "").split())
        inner, listed = inner_section(of_key.annotation), listed_section(of_key.annotation)
        values = "the keys below, or null" if inner else _values(of_key.annotation, of_key.metadata)
        cells = (f"`{name}.{key}`", values, default, meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        if inner or listed:
            yield from _rows(f"{name}.{key}" if inner else f"{name}.{key}.NAME", inner or listed)


def listed_section(annotation: Any) -> type[Section] | None:
    """The section that each entry of a list, or of a mapping of names, is."""
    entries = get_args(annotation) if get_origin(annotation) in (tuple, dict) else ()
    return next((each for each in entries if isinstance(each, type) and issubclass(each, Section)), None)


def _written(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def _values(annotation: Any, metadata: list[Any]) -> str:
    """What a key takes, in words: `number, above 0, at most 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if metadata_of := getattr(annotation, "__metadata__", None):
        return _values(arguments[0], [*metadata_of, *metadata])
    if origin in (Union, types.UnionType):
        inner = [_values(each, metadata) for each in arguments if each is not type(None)]
        return ", or ".join([*inner, "null"] if type(None) in arguments else inner)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {_values(arguments[0], [])}"
    names = {int: "integer", float: "number", bool: "`true`, `false`"}
    return ", ".join([names.get(annotation, "text"), *_limits(metadata)])


def _limits(metadata: list[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _limits(item.metadata)
        for kind, name, words in (
            (Gt, "gt", "above"),
            (Ge, "ge", "at least"),
            (Lt, "lt", "below"),
            (Le, "le", "at most"),
        ):
            if isinstance(item, kind):
                yield f"{words} {getattr(item, name)}"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(markdown(), encoding="utf-8")
