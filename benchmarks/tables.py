"""`python -m benchmarks.tables`: the tables of `docs/performance.md`, from the JSON files under `benchmarks/results/`.

Each file there is what one benchmark command wrote with --results, in a folder named after the machine. Everything
between the page's two markers is replaced; the text around them is written by hand.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row, columns, growth

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
MARKERS = "<!-- tables: made by python -m benchmarks.tables -->", "<!-- end of the tables -->"


def tables(results: Path = ROOT / "benchmarks" / "results") -> Iterator[str]:
    """Markdown lines: a section a machine, then a command with its groups of rows."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        paths = [path for path in sorted(folder.glob("*.json")) if ".pytest-benchmark" not in path.name]
        files = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
        if not files:
            continue
        about = files[0][1]["machine"]
        yield f"## {folder.name}\n"
        yield ", ".join(f"{name} {value}" for name, value in about.items()) + ".\n"
        for _, content in files:
            yield f"### `{content['command']}`\n\n{content['date']}\n"
            yield from _groups([Row(**row) for row in content["rows"]])


def _groups(rows: list[Row]) -> Iterator[str]:
    for group, cells in columns(rows).items():
        yield f"**{group}**\n"
        yield "| " + " | ".join(cells) + " |\n|" + "---|" * len(cells)
        for line in zip(*cells.values(), strict=True):
            yield "| " + " | ".join(line) + " |"
        yield ""
        if group.startswith("growth of "):
            members = [row for row in rows if row.group == group]
            letter = members[0].name.split(" = ")[0]
            yield "Time grows with {0}^{1:.2f}, memory with {0}^{2:.2f}.\n".format(letter, *growth(members))


def main(page: Path = PAGE) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    page.write_text("\n".join([before + MARKERS[0], "", *tables(), MARKERS[1]]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
