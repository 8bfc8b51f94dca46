"""The wheel: what it holds, and that it works where there is no repository."""

import json
import os
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
from conftest import tiny_model, tiny_tokenizer

from distill.servers import PLUGIN

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel installed, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def test_it_holds_the_two_packages_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"distill", "distill_kernels"}
    shipped = {name.removeprefix("distill/shipped/") for name in names if name.startswith("distill/shipped/")}
    assert shipped == {"configs/default.yaml", "data/prompts.txt", "data/eval.txt"}
    assert str((PLUGIN / "hidden_states_connector.py").relative_to(ROOT)) in names  # which no module here imports


def test_the_default_recipe_runs_in_an_empty_folder(installed, tmp_path):
    """Two steps of it with tiny models, by the console command; and the other commands on what came of it."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, family, seed in (("student", "llama", 1), ("teacher", "qwen3", 2)):
        tiny_model(family, vocab_size=264, seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)

    def python(*words: str, said: str = "") -> subprocess.CompletedProcess:
        variables = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=empty, env=variables, input=said, capture_output=True, text=True)

    distill = partial(python, str(installed / "bin" / "distill"))

    options = {
        "--student.model": str(tmp_path / "student"),
        "--student.drop_layers": "[]",
        "--teacher.model": str(tmp_path / "teacher"),
        "--prompts.max_tokens": "400",
        "--training.max_steps": "2",
        "--training.device": "cpu",
    }
    words = [word for option in options.items() for word in option]
    result = distill("train", "--config", "default", *words)
    assert result.returncode == 0, result.stderr
    run = empty / "outputs" / "default"
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert f"train: {installed / 'distill' / 'shipped' / 'data' / 'prompts.txt'}" in (run / "config.yaml").read_text()
    assert (run / "final" / "model.safetensors").exists()
    (run / "report.html").unlink()
    assert distill("report", str(run)).returncode == 0
    assert (run / "report.html").exists()
    talked = distill("chat", str(run / "final"), "--max-new-tokens", "2", said="Hello\n\n")
    assert talked.returncode == 0, talked.stderr
    prompts = installed / "distill" / "shipped" / "data" / "eval.txt"
    models = ("--student", str(run / "final"), "--teacher", str(tmp_path / "teacher"))
    compared = distill("evaluate", *models, "--prompts", str(prompts), "--num-rollouts", "1", "--max-new-tokens", "3")
    assert "reverse kl" in compared.stdout, compared.stderr
    assert {path.name for path in empty.iterdir()} == {"outputs"}
    where = "import distill, distill_kernels as k; print(distill.__file__, k.__file__)"
    came = python("-c", where).stdout.split()
    assert came == [str(installed / name / "__init__.py") for name in ("distill", "distill_kernels")]


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        ([], 2, "usage: distill COMMAND", ""),
        (["--help"], 0, "  train     train a student", ""),
        (["trian"], 2, "", "there is no command 'trian'; did you mean train?"),
        (["x"], 2, "", "the commands are train, chat, evaluate, report"),
        (["train", "--config", "nowhere"], 2, "", "nowhere: there is no such file, and no recipe of that name"),
        (["report", "nowhere"], 2, "", "nowhere: no metrics.jsonl there"),
    ],
)
def test_the_console_command_hands_on_what_it_is_given(words, status, out, err, capsys):
    from distill.__main__ import main

    assert main(words) == status
    said = capsys.readouterr()
    assert out in said.out
    assert err in said.err
