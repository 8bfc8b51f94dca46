"""The way in from Python: `Config.load`, `fit`, and what `import distill` costs."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_train import ROOT, environment, metrics_of

import distill
from distill import Config, ConfigError, Interrupted, Summary, fit
from distill.models import ModelError
from distill.run import OutputError
from distill.run.output import OutputFolder
from distill.runtime import read_json_lines
from distill.train import main


@pytest.fixture
def handlers():
    """The signals' handlers as they were, for what has to put them back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield [signal.default_int_handler] * 2
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def now() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_importing_it_loads_nothing_large():
    code = "import sys, distill; print(sorted({name.split('.')[0] for name in sys.modules}), dir(distill))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    loaded = set(re.findall(r"'(\w+)'", result.stdout))
    assert not loaded & {"torch", "transformers", "pydantic", "numpy", "yaml", "rich"}
    assert {"Config", "Summary", "fit"} <= loaded, "dir() names what can be had"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        distill.trian  # noqa: B018


def test_fit_is_the_run_that_the_command_makes(write_config, tmp_path, handlers, capsys):
    path = write_config({"training.max_steps": 3})
    assert main(["--config", str(path), "--training.output_dir", str(tmp_path / "command")]) == 0
    signal.signal(signal.SIGINT, handlers[0])
    signal.signal(signal.SIGTERM, handlers[1])
    said = capsys.readouterr().out
    summary = fit(Config.load(path, {"training.output_dir": str(tmp_path / "python")}))
    assert metrics_of(tmp_path / "python") == metrics_of(tmp_path / "command")
    assert {p.name for p in (tmp_path / "python").iterdir()} == {p.name for p in (tmp_path / "command").iterdir()}
    assert isinstance(summary, Summary)
    assert summary.record() == json.loads((tmp_path / "python" / "summary.json").read_text())
    assert summary.steps == 3
    evaluations = read_json_lines(tmp_path / "command" / "evaluations.jsonl")
    assert summary.eval_reverse_kl_after == evaluations[-1]["reverse_kl"]

    def lines(text: str) -> list[str]:
        return [re.sub(r"  \d+ tokens/s.*|\d+ s;.*", "", line) for line in text.splitlines() if "/command" not in line]

    assert lines(capsys.readouterr().out.replace("/python", "/command")) == lines(said), "the same progress"
    assert now() == handlers


def test_fit_can_be_called_again_in_the_same_process(write_config, tmp_path):
    again = []
    for name in ("one", "two"):
        config = Config.load(write_config({"training.max_steps": 2}), {"training.output_dir": str(tmp_path / name)})
        again.append(fit(config))
    assert metrics_of(tmp_path / "one") == metrics_of(tmp_path / "two")
    finished = fit(config)  # nothing is left to do, and it says what there is
    assert finished.steps == 2
    assert finished.eval_reverse_kl_after == again[1].eval_reverse_kl_after


def test_an_interrupt_saves_raises_and_the_same_call_continues(write_config, tmp_path, handlers):
    path = write_config()
    whole = fit(Config.load(path, {"training.output_dir": str(tmp_path / "whole")}))
    asked = []

    def press() -> bool:
        asked.append(1)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return False

    config = Config.load(path)
    with pytest.raises(KeyboardInterrupt, match="saved after step 2 in"):
        fit(config, should_stop=press)
    assert now() == handlers
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    assert fit(config).steps == whole.steps
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_a_second_interrupt_is_for_whoever_handled_them_before(write_config, handlers):
    pressed = []

    def press() -> bool:
        pressed.append(1)
        signal.raise_signal(signal.SIGINT)  # the first is remembered, the second raises here
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(Config.load(write_config()), should_stop=press)
    assert pressed == [1]
    assert not isinstance(caught.value, Interrupted)
    assert now() == handlers
    assert fit(Config.load(write_config())).steps == 5, "the folder was let go"


def test_sigterm_reaches_the_handler_that_was_there(write_config, handlers):
    heard, asked = [], []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))

    def terminated() -> bool:
        asked.append(1)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGTERM)
        return False

    with pytest.raises(Interrupted, match="saved after step 1"):
        fit(Config.load(write_config()), should_stop=terminated)
    assert heard == [signal.SIGTERM]


def test_in_a_thread_it_sets_no_handlers_and_is_asked_to_stop(write_config, tmp_path, handlers):
    config, found = Config.load(write_config()), []

    def stopped() -> None:
        try:
            fit(config, should_stop=lambda: found.append(now()) or len(found) == 3)
        except Interrupted as error:
            found.append(error)
        found.append(fit(config))

    thread = threading.Thread(target=stopped)
    thread.start()
    thread.join()
    *seen, error, summary = found
    assert all(handlers_then == handlers for handlers_then in seen)
    assert "saved after step 2" in str(error)
    assert summary.steps == 5


def test_what_the_command_would_exit_with_is_raised(write_config, tmp_path, tiny_pair):
    with pytest.raises(ModelError, match="nowhere"):
        fit(Config.load(write_config(), {"student.model": str(tmp_path / "nowhere")}))
    folder = OutputFolder(tmp_path / "run")
    with pytest.raises(OutputError, match="in use by another run"):
        fit(Config.load(write_config()))
    folder.release()


def test_load_lays_overrides_over_a_file(write_config):
    path = write_config({"student.lora.rank": 4})
    config = Config.load(path, {"training.max_steps": 3, "student.lora.alpha": 2.0, "loss.objective": "jsd"})
    assert (config.training.max_steps, config.loss.objective) == (3, "jsd")
    assert (config.student.lora.rank, config.student.lora.alpha) == (4, 2.0)
    assert config.training.num_rollouts_per_prompt == 2, "the file's"
    assert Config.load(path) == Config.load(str(path), {})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"training.max_step": 3}, r"overrides: unknown key 'training.max_step'; did you mean 'training.max_steps'"),
        ({"trainer.max_steps": 3}, r"overrides: unknown key 'trainer'"),
        ({"training.max_steps": "many"}, r"overrides: training.max_steps: found 'many', expected"),
        ({"training": 3}, r"overrides: training: found 3, expected"),
        ({"training": 3, "training.max_steps": 3}, r"overrides: 'training.max_steps' and one of its sections"),
        ({"training.max_steps": 3, "training": {}}, r"overrides: 'training.max_steps' and one of its sections"),
        ({"student.lora": 4}, r"overrides: student.lora: found 4, expected"),
    ],
)
def test_what_cannot_be_laid_over_is_named(write_config, overrides, said):
    with pytest.raises(ConfigError, match=said):
        Config.load(write_config(), overrides)


def test_a_recipe_is_found_by_its_name_and_reads_the_prompts_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").mkdir()  # such as the output folder of an earlier run
    named, file = Config.load("default"), Config.load(ROOT / "configs" / "default.yaml")
    assert named.prompts.train == ROOT / "data" / "prompts.txt"
    assert named.prompts.eval == ROOT / "data" / "eval.txt"
    paths = {"train": None, "eval": None}
    assert named.model_copy(update={"prompts": None}) == file.model_copy(update={"prompts": None})
    assert named.prompts.model_copy(update=paths) == file.prompts.model_copy(update=paths)
    with pytest.raises(ConfigError, match=r"defualt: there is no such file, and no recipe of that name; .*default"):
        Config.load("defualt")
    (tmp_path / "default").rmdir()
    (tmp_path / "default").write_text((ROOT / "configs" / "lora.yaml").read_text())
    assert Config.load("default").student.lora, "a file of that name comes first"


def test_the_readme_shows_it(write_config, tmp_path, monkeypatch):
    """Its lines as they are, in a folder whose default recipe is a tiny one."""
    section = (ROOT / "README.md").read_text().split("## From Python")[1]
    code = section.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    recipe = write_config({"training.max_steps": 4})
    (tmp_path / "configs").mkdir()
    recipe.rename(tmp_path / "configs" / "default.yaml")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["summary"].steps == 3
    assert Path(names["summary"].samples[0]["prompt"]).name == "Count to three."
