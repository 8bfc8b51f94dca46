"""`training.hub_id`, against a stand-in of the hub, by the command as a user gives it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from distill.runtime import read_json_lines
from distill.train import main

ROOT = Path(__file__).parent.parent
NAME = "me/student"


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.close()


@pytest.fixture
def train(hub, write_config, monkeypatch, tmp_path, capsys):
    """Runs the command here with changes of the configuration; returns its status and what it said."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has the older way of large files
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(changes: dict | None = None) -> tuple[int, list[str]]:
        status = main(
            ["--config", str(write_config({"training.max_steps": 2, "training.hub_id": NAME} | (changes or {})))]
        )
        return status, capsys.readouterr().err.splitlines()

    return run


def test_the_command_pushes_the_final_model_whole_and_private(hub, write_config, tmp_path):
    """In a process of its own, with nothing but the environment that a user has."""
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    here = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    here |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    config = write_config({"training.max_steps": 2, "training.hub_id": NAME})
    words = [sys.executable, "-m", "distill.train", "--config", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, env=kept | here, check=False)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/{NAME}" in done.stdout
    assert hub.private == {NAME: True}
    final = tmp_path / "run" / "final"
    assert hub.files[NAME] == {path.name: path.read_bytes() for path in final.iterdir()}
    assert {"README.md", "model.safetensors", "tokenizer.json", "distill_config.yaml"} <= set(hub.files[NAME])
    (message,) = hub.messages
    assert message.startswith("2 steps of on-policy distillation of ")
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in hub.files[NAME].items():
        (pushed / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(pushed)


def test_it_is_public_where_that_is_asked_for(train, hub):
    assert train({"training.hub_private": False})[0] == 0
    assert hub.private == {NAME: False}


def test_offline_it_is_refused_before_anything_is_loaded(train, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, (line,) = train()
    assert status == 2
    assert line.startswith("error: training.hub_id: me/student cannot be pushed to, as HF_HUB_OFFLINE is set")
    assert not (tmp_path / "run").exists()
    assert not hub.private


@pytest.mark.parametrize(
    ("changes", "token", "url", "said"),
    [
        ({}, "", None, "nobody is logged in"),
        ({}, "hf_wrong", None, "does the token allow writing there?"),
        ({"training.hub_id": "others/student"}, TOKEN, None, "does the token allow writing there?"),
        ({"training.hub_id": "me/open"}, TOKEN, None, "me/open is there and public, and training.hub_private is true"),
        ({}, TOKEN, "http://127.0.0.1:9", "http://127.0.0.1:9: "),
    ],
)
def test_what_is_known_at_the_start_is_said_then(train, hub, tmp_path, monkeypatch, changes, token, url, said):
    hub.private["me/open"] = False
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "ENDPOINT", url or hub.url)
    status, (line,) = train(changes)
    assert status == 2
    assert line.startswith("error: training.hub_id: ")
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["/preupload/", "/upload/", "/commit/"])
def test_a_push_that_fails_loses_nothing_and_the_same_command_pushes_again(train, hub, tmp_path, place):
    hub.fails[place] = 403 if place != "/upload/" else 400
    status, (*_, line) = train()
    assert status == 2
    assert line.startswith("error: training.hub_id: ")
    run = tmp_path / "run"
    assert f"its model is {run / 'final'}: give the same command again, which only pushes" in line
    assert {"summary.json", "report.html", "final"} <= {path.name for path in run.iterdir()}
    before, weights = (run / "metrics.jsonl").read_bytes(), (run / "final" / "model.safetensors").read_bytes()
    hub.fails.clear()
    assert train()[0] == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    assert hub.files[NAME]["model.safetensors"] == weights
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]
    assert len(read_json_lines(run / "metrics.jsonl")) == 2
