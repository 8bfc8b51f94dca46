"""Collects the rows that benchmarks record, prints them as one table, and writes them where --results says.

The file is written anew with every row, so that a run which is cut short leaves what it had measured.
"""

import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.harness import DRY, Row, describe_machine, format_table, gpu_or_cpu, write_json

_rows = pytest.StashKey[list[Row]]()
_absent = pytest.StashKey[dict[str, str]]()
_kept = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write the recorded rows to this JSON file")
    parser.addoption("--whole-grid", action="store_true", help="every cell of every grid; an hour on two CPU cores")
    parser.addoption("--tables", action="store_true", help="then renew the tables of docs/performance.md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.stash[_absent] = {}
    config.stash[_kept] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a GPU is left out where there is none, and what takes minutes by itself without `--whole-grid`."""
    if not (torch.cuda.is_available() or DRY):
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    if not config.getoption("--whole-grid"):
        for item in items:
            if item.get_closest_marker("whole_grid"):
                item.add_marker(pytest.mark.skip(reason="a cell of --whole-grid"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return gpu_or_cpu()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Adds a row to the table at the end of the run."""

    def add(row: Row) -> None:
        request.config.stash[_rows].append(row)
        write_results(request.config)

    return add


@pytest.fixture
def absent(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Notes, for the end of the run, that a candidate has no row in a group, and why."""

    def note(group: str, name: str, reason: str) -> None:
        request.config.stash[_absent][f"{name} in {group}"] = reason.removeprefix("Skipped: ")

    return note


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Keeps a value beside the rows, by name, where --results says."""

    def add(name: str, value: Any) -> None:
        request.config.stash[_kept][name] = value
        write_results(request.config)

    return add


def write_results(config: pytest.Config) -> None:
    """Writes what there is so far where --results says."""
    path = config.getoption("--results")
    if not path:
        return
    # Without the options that say where the results go, so that the command can be repeated as it stands.
    ours = ("--results", path, "--tables", "-q", "--benchmark-disable")
    words = [str(word) for word in config.invocation_params.args if word not in ours]
    more = {"absent": config.stash[_absent]} if config.stash[_absent] else {}
    command = shlex.join(["pytest", *words])
    write_json(path, config.stash[_rows], gpu_or_cpu(), command=command, **more, **config.stash[_kept])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    terminalreporter.section("measured")
    about = describe_machine(gpu_or_cpu())
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in about.items()))
    terminalreporter.write_line(format_table(rows))
    for what, reason in config.stash[_absent].items():
        terminalreporter.write_line(f"without {what}: {reason}")
    write_results(config)
    if config.getoption("--results") and config.getoption("--tables"):
        tables.main()
