"""Collects the rows that benchmarks record, prints them as one table, and writes them where --results says."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import tables
from benchmarks.harness import Row, describe_machine, format_table, write_json

_rows = pytest.StashKey[list[Row]]()
_absent = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write the recorded rows to this JSON file")
    parser.addoption("--whole-grid", action="store_true", help="every cell of every grid; an hour on two CPU cores")
    parser.addoption("--tables", action="store_true", help="then renew the tables of docs/performance.md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.stash[_absent] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--whole-grid`, what takes minutes by itself is left out and said to be."""
    if not config.getoption("--whole-grid"):
        for item in items:
            if item.get_closest_marker("whole_grid"):
                item.add_marker(pytest.mark.skip(reason="a cell of --whole-grid"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Adds a row to the table at the end of the run."""
    return request.config.stash[_rows].append


@pytest.fixture
def absent(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Notes, for the end of the run, that a candidate has no row in a group, and why."""

    def note(group: str, name: str, reason: str) -> None:
        request.config.stash[_absent][f"{name} in {group}"] = reason.removeprefix("Skipped: ")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    terminalreporter.section("measured")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in describe_machine(device).items()))
    terminalreporter.write_line(format_table(rows))
    for what, reason in config.stash[_absent].items():
        terminalreporter.write_line(f"without {what}: {reason}")
    if path := config.getoption("--results"):
        # Without the options that say where the results go, so that the command can be repeated as it stands.
        ours = ("--results", path, "--tables", "-q")
        words = [word for word in config.invocation_params.args if word not in ours]
        write_json(Path(path), rows, device, command=shlex.join(["pytest", *map(str, words)]))
        if config.getoption("--tables"):
            tables.main()
