"""The documentation: what is generated is up to date, and what it points to is there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_configuration_keys_is_that_of_the_code():
    made = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["markdown"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_files_that_exist(page):
    named = re.findall(r"(?:configs|data|benchmarks|docs)/[\w/.-]+\.(?:yaml|txt|jsonl|py|sh|md)", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]
