"""Files that a kill or a full disk leaves whole: JSON lines that grow, and what is renamed into its place."""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class JsonLines:
    """An append-only file of JSON objects, one a line, each with the operating system as soon as it is written.

    Opening it cuts off everything from the first line on that is not whole or that `keep` turns down.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda record: False) -> None:
        self._file = path.open("a+b", buffering=0)
        self._file.truncate(_kept_bytes(path, keep))

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends all of the records, or raises OSError and appends none."""
        content, before = memoryview("".join(map(json_line, records)).encode()), self._file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(before)
            raise

    def sync(self) -> None:
        """Returns when everything written is on the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _kept_bytes(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or not keep(json.loads(line)):
                    break
            except (ValueError, KeyError, TypeError):  # not JSON, or not a record of ours
                break
            kept += len(line)
    return kept


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def json_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON, with null for what is no finite number."""
    return json.dumps(_clean(record), ensure_ascii=False, allow_nan=False) + "\n"


def _clean(value: Any) -> Any:
    # JSON has no NaN: a reader in another language would stumble over it.
    if isinstance(value, dict):
        return {key: _clean(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and renames it, so that it is there whole or as it was before."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
