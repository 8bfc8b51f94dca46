"""`make recipes`: every page here is run as it is written, and has to reach the figures that it states."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.config import parse_command_line

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
PAGES = sorted(FOLDER.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_recipe_reaches_what_it_states(page):
    text = page.read_text(encoding="utf-8")
    if needs := re.search(r"<!-- needs: (.*) -->", text):
        pytest.skip(f"needs {needs[1]}")
    command = re.search(r"^python -m distill\.train (.*)$", text, re.MULTILINE)[1]
    config = parse_command_line(shlex.split(command))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    words = [sys.executable, "-m", "distill.train", *shlex.split(command)]
    subprocess.run(words, cwd=ROOT, env=environment, check=True)
    summary = json.loads((ROOT / config.training.output_dir / "summary.json").read_text(encoding="utf-8"))
    print(f"{page.stem}: {summary['wall_seconds']:.0f} s")
    for what, first, last in reductions(text, summary):
        print(f"{page.stem}: reduced from {first:.3f} by {1 - last / first:.1%}, stated {what:.0%}")
        assert 1 - last / first >= what
    for name, figure, least, when in re.findall(r"<!-- metric: (\S+) (\S+) (\S+)(?: (\S+))? -->", text):
        found = metric(summary, name, figure, when or "after")
        print(f"{page.stem}: {name} {figure} {found:.0%}, stated {float(least):.0%}")
        assert found >= float(least)
    for name, figure, most in re.findall(r"<!-- lost: (\S+) (\S+) (\S+) -->", text):
        lost = metric(summary, name, figure, "warm_start") - metric(summary, name, figure, "after")
        print(f"{page.stem}: {name} {figure} lost {lost:.0%}, stated {float(most):.0%} at most")
        assert lost <= float(most)


def reductions(text: str, summary: dict) -> Iterator[tuple[float, float, float]]:
    """What the page states of the held-out reverse KL, and the two figures: of the whole run, or since a warm start."""
    before = {
        "reduction": summary["eval_reverse_kl_before"],
        "recovery": summary.get("warm_start", {}).get("eval_reverse_kl"),
    }
    found = re.findall(r"<!-- (reduction|recovery): (.*) -->", text)
    assert found, "the page states no reduction"
    return ((float(stated), before[since], summary["eval_reverse_kl_after"]) for since, stated in found)


def metric(summary: dict, name: str, figure: str, when: str) -> float:
    """The mean of `SET/METRIC` or `METRIC`, at the end or after the warm start."""
    of_set, _, metric = name.rpartition("/")
    said = summary["warm_start"] if when == "warm_start" else summary
    return said["eval_metrics"][of_set or "main"][metric][figure]["after"]["mean"]
