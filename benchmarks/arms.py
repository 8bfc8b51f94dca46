"""Whole runs of a recipe that differ in a few keys, and the table of them that a page holds."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
END = "<!-- end of the table -->"


def summary_of(recipe: Path, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The summary of the run in `folder`, which is made where it is not there and goes on where it was stopped; `words`
    are the command line's."""
    if not (folder / "summary.json").exists():
        own = ["--training.output_dir", str(folder), *words]
        command = [sys.executable, "-m", "distill.train", "--config", str(recipe), *own]
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its head first."""
    head, *others = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *others))


def write(page: Path, made_by: str, lines: str) -> None:
    """Puts a table between the two markers of a page, of which the first names the command."""
    begin = f"<!-- table: made by {made_by} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{begin}\n\n{lines}\n\n{END}{after}", encoding="utf-8")
