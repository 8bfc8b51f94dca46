"""Records of prompt files: one mapping a record, and where it stands, for messages.

Text, JSON lines and CSV are read here, strictly and cell by cell as they are written. Parquet files, folders and names
of the Hugging Face hub go through the `datasets` library, with the readers of READERS alone: none runs a dataset's code
or unpickles. Left out: formats of pictures and sounds, and columns that hold them.
"""

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]
Records = Iterator[tuple[str, Record | None]]

BLANK: Record = {}
MAX_LINE_BYTES, MAX_FILE_BYTES = 2**22, 2**30
READERS = {"parquet", "arrow", "json", "csv", "text", "cache"}  # the last: what was downloaded before
HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
FORMATS = (
    ".txt (one prompt a line), .jsonl (one JSON object a line), .csv (with a line of column names), .parquet, a folder "
    "of such files, or hub:OWNER/NAME of the Hugging Face hub"
)


class PromptError(ValueError):
    """Prompts that cannot be used, with the place and what to do."""


def read(source: Path, *, whole: bool = True, streaming: bool = False) -> Records:
    """Each record's place and content: BLANK for a blank line, None for one longer than any prompt.

    `whole` refuses text too large to be read to its end; `streaming` reads a hub dataset only as far as it is asked
    for, instead of downloading it.
    """
    name = str(source)
    if name.startswith("hub:"):
        return _hub(name, streaming)
    if source.suffix in (".txt", ".jsonl", ".csv"):
        return _text(source, whole)
    if source.is_dir():
        return _folder(source, "train")
    folder, _, split = name.rpartition(":")
    if folder and Path(folder).is_dir():
        return _folder(Path(folder), split)
    if source.suffix == ".parquet" and source.exists():
        return _rows(name, {"path": "parquet", "data_files": {"train": glob.escape(name)}}, "train")
    found = "is none of the kinds that are read" if source.exists() else "there is no such file"
    raise PromptError(f"{name}: {found}; prompts are in {FORMATS}")


def _text(path: Path, whole: bool) -> Records:
    try:
        size = path.stat().st_size
        if whole and size > MAX_FILE_BYTES:
            raise PromptError(
                f"{path}: {size / 2**30:.1f} GiB, and at most {MAX_FILE_BYTES / 2**30:.0f} are read whole: take a part "
                f"of it, by prompts.limit for example"
            )
        with path.open("rb") as file:
            if path.suffix == ".csv":
                yield from _cells(file, path)
                return
            for number, line in enumerate(_lines(file, path), 1):
                where = f"{path}, line {number}"
                if line is None:
                    yield where, None
                elif not line.strip():
                    yield where, BLANK
                else:
                    yield where, {"prompt": line.strip()} if path.suffix == ".txt" else _parsed(line, where)
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


def _parsed(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    # ValueError also for a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise PromptError(f'{where}: expected a JSON object such as {{"prompt": "text"}}; found {line[:80]!r}')
    return record


def _cells(file: BinaryIO, path: Path) -> Records:
    """Rows of a CSV file; every cell is the text that is written, `NA` and `007` too."""
    csv.field_size_limit(MAX_LINE_BYTES)
    # What stands for a line that is too long is a cell that is too long, which the reader refuses.
    lines = (" " * (MAX_LINE_BYTES + 1) if line is None else line for line in _lines(file, path))
    rows = csv.reader((f"{line}\n" for line in lines), strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if header is None:
                header = row
            elif not row:
                yield where, BLANK
            elif len(row) != len(header):
                raise PromptError(f"{where}: expected {len(header)} cells, as in the first line; found {len(row)}")
            else:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise PromptError(f"{path}, line {rows.line_num}: not valid CSV: {error}") from None


def _hub(name: str, streaming: bool) -> Records:
    parts = HUB.fullmatch(name)
    if parts is None:
        raise PromptError(f"{name}: expected hub:OWNER/NAME or hub:OWNER/NAME/CONFIG, with :SPLIT after it if need be")
    build = {"path": parts["name"], "name": parts["config"]}
    return _rows(name, build, parts["split"] or "train", stored=not streaming)


def _folder(folder: Path, split: str) -> Records:
    return _rows(str(folder), {"path": str(folder)}, split, inside=f"{folder.resolve()}{os.sep}")


def _rows(name: str, build: dict[str, Any], split: str, *, inside: str = "", stored: bool = False) -> Records:
    """Rows as the `datasets` library reads them, without the columns that hold pictures, sounds and the like.

    Refuses files of another kind, and such as do not begin with `inside`.

    `stored` puts the whole split into that library's cache first; otherwise rows are read as they are asked for.
    """
    try:
        import datasets
    except ImportError:
        raise PromptError(
            f"{name}: reading it needs the package datasets: pip install 'distill-on-policy[data]'"
        ) from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it raises too
    number = 0
    try:
        builder = datasets.load_dataset_builder(**build)
        _check(name, builder, inside)
        if stored:
            builder.download_and_prepare()
        rows = builder.as_dataset(split) if stored else builder.as_streaming_dataset(split)
        features = rows.features or {}  # none of what is read as text
        if any(map(_decodes, features.values())):
            rows = rows.select_columns([column for column, kind in features.items() if not _decodes(kind)])
        for row in rows:
            number += 1
            yield f"{name}, row {number}", {column: _as_written(column, value) for column, value in row.items()}
    except PromptError:
        raise
    # What that library and those below it raise has no common class.
    except Exception as error:
        place = f"{name}, after row {number}" if number else name
        reason = " ".join(str(error).split())[:600]
        raise PromptError(f"{place}: cannot be read: {type(error).__name__}: {reason}") from None


def _decodes(feature: Any) -> bool:
    """Whether a column of this kind would be decoded when a row is read, as pictures are, in whatever depth."""
    if isinstance(feature, dict):
        return any(map(_decodes, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_decodes, feature))
    if hasattr(feature, "feature"):
        return _decodes(feature.feature)
    # JSON is text, which holds what does not fit a table's columns.
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"


def _as_written(column: str, value: Any) -> Any:
    """A cell without what a table fills in: as null, each key that the tools or calls of other rows have."""
    if column == "tools":
        return _without_nulls(value)
    if not isinstance(value, list):
        return value
    calls = [isinstance(message, dict) and message.get("tool_calls") for message in value]
    return [
        message | {"tool_calls": _without_nulls(own)} if own else message
        for message, own in zip(value, calls, strict=True)
    ]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _check(name: str, builder: Any, inside: str) -> None:
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in READERS:
        raise PromptError(
            f"{name}: holds files of the kind {reader}; those read are {', '.join(sorted(READERS - {'cache'}))}"
        )
    for group in (builder.config.data_files or {}).values():  # the library itself looks after those of a hub dataset
        for file in map(str, group):
            if not file.startswith(inside) or ".." in file.split("/"):
                raise PromptError(f"{name}: its README names a file elsewhere, which is not read: {file}")
