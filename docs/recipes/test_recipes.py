"""`make recipes`: every page here is run as it is written, and has to reach the figures that it states."""

import json
import os
import re
import shlex
import subprocess
import sys
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
    stated = float(re.search(r"<!-- reduction: (.*) -->", text)[1])
    reached, seconds = summary["eval_reverse_kl_reduction"], summary["wall_seconds"]
    print(f"{page.stem}: reduced by {reached:.1%} in {seconds:.0f} s, stated {stated:.0%}")
    assert reached >= stated
    for metric, figure, least in re.findall(r"<!-- metric: (\S+) (\S+) (\S+) -->", text):
        found = summary["eval_metrics"]["main"][metric][figure]["after"]["mean"]
        print(f"{page.stem}: {metric} {figure} {found:.0%}, stated {float(least):.0%}")
        assert found >= float(least)
