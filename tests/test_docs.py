"""The documentation: what is generated is up to date, and what it points to is there."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
from test_train import execute

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_page_of_configuration_keys_is_that_of_the_code():
    made = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["markdown"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_files_that_exist(page):
    named = re.findall(r"(?:configs|data|benchmarks|docs)/[\w/.-]+\.(?:yaml|txt|jsonl|py|sh|md)", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_tests_that_the_page_on_reliability_names_exist():
    def names_of(module: str) -> set[str]:
        tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text())
        return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}

    named, module = [], ""
    for name in re.findall(r"`(test_\w+\.py::\w+|\.\.\._\w+)`", (ROOT / "docs" / "reliability.md").read_text()):
        if "::" in name:
            module, test = name.split(".py::")
            assert test in names_of(module), name
        else:  # `..._ending` is a test of the file that was named last
            assert [test for test in names_of(module) if test.endswith(name.removeprefix("..."))], (module, name)
        named.append(name)
    assert len(named) > 60


def test_every_figure_that_a_run_writes_is_explained(write_config, tmp_path):
    execute(write_config({"training.max_steps": 2}))
    run, page = tmp_path / "run", (ROOT / "docs" / "report.md").read_text()
    for name in ("metrics.jsonl", "evaluations.jsonl", "tokens.jsonl", "summary.json"):
        section = page.split(f"### `{name}`")[1].split("\n##")[0]
        explained = {
            key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)
        }
        text = (run / name).read_text()
        record = json.loads(text) if name == "summary.json" else json.loads(text.splitlines()[0])
        written = set(record) | (set(record["samples"][0]) if name == "tokens.jsonl" else set())
        assert explained == written, name


def test_so_is_what_a_run_with_written_answers_writes_beside(write_config, tmp_path):
    (tmp_path / "answered.jsonl").write_text('{"prompt": "Say red.", "completion": "red"}\n{"prompt": "Say it."}\n')
    answers = {"prompts.train": str(tmp_path / "answered.jsonl"), "training.warm_start.steps": 1}
    execute(write_config(answers | {"training.off_policy_fraction": 0.5, "training.max_steps": 1}))
    page, run = (ROOT / "docs" / "report.md").read_text(), tmp_path / "run"
    for name in ("metrics.jsonl", "summary.json"):
        section = page.split(f"### `{name}`")[1].split("\n##")[0]
        text = (run / name).read_text()
        records = [json.loads(text)] if name == "summary.json" else list(map(json.loads, text.splitlines()))
        for key in {key for record in records for key in (*record, *record.get("warm_start", {}))}:
            assert f"`{key}`" in section, (name, key)
