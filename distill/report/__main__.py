"""`python -m distill.report RUN [RUN ...]`: a run's report anew, or a page that compares runs."""

import argparse
import sys
from pathlib import Path

from distill.report.page import comparison_page, write_report
from distill.runtime import write_whole


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.report",
        description="Writes a run's report.html anew; of several runs, one page that compares them.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's output folder")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="the page that compares runs")
    options = parser.parse_args(argv)
    for run in options.runs:
        if not (run / "metrics.jsonl").exists():
            print(f"{run}: no metrics.jsonl there, so it is no run's output folder", file=sys.stderr)
            return 2
    try:
        if len(options.runs) == 1:
            print(write_report(options.runs[0]))
        else:
            write_whole(options.output, comparison_page(options.runs).encode())
            print(options.output)
    except OSError as error:
        print(f"the page could not be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
