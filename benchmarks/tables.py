"""`python -m benchmarks.tables`: the tables of `docs/performance.md`, from the JSON files under `benchmarks/results/`.

Each file there is what one benchmark command wrote with --results, in a folder named after the machine. Everything
between the page's two markers is replaced; the text around them is written by hand.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row, ratios

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
    compared = ratios(rows)
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        columns = {
            "": lambda row: row.name,
            "seconds": lambda row: f"{row.seconds:.3g}",
            "spread": lambda row: _show(row.spread, "{:.0%}"),
            "ratio": lambda row, group=group: f"{compared[group, row.name]:.2f}",
            "tokens/s": lambda row: _show(row.tokens, "{:.0f}", row.seconds),
            "GFLOP": lambda row: _show(row.flops, "{:.1f}", 1e9),
            "of the limit": lambda row: _show(row.fraction, "{:.0%}"),
            "peak MiB": lambda row: _show(row.peak_bytes, "{:.0f}", 2**20),
        }
        cells = {name: [column(row) for row in members] for name, column in columns.items()}
        shown = [name for name, values in cells.items() if any(values)]
        yield f"**{group}**\n"
        yield "| " + " | ".join(shown) + " |\n|" + "---|" * len(shown)
        for line in range(len(members)):
            yield "| " + " | ".join(cells[name][line] for name in shown) + " |"
        yield ""


def _show(value: float | None, pattern: str, unit: float = 1) -> str:
    return "" if value is None else pattern.format(value / unit)


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    PAGE.write_text("\n".join([before + MARKERS[0], "", *tables(), MARKERS[1]]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
