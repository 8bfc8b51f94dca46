"""`teacher.server_gives: hidden`: a teacher whose layers a server computes, and whose end is here."""

import json
import re

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from families import EXPECTED, tiny_config
from serving import ModelServer
from test_train import SAMPLED, events_of, execute, metrics_of, weights_of
from transformers import AutoModelForCausalLM

from distill.evaluate import main as evaluate
from distill.models import ModelError, layer_stack, load_end
from distill.report.charts import run_charts
from distill.runtime import read_json_lines
from distill.teachers.served import command
from distill.train import main

pytestmark = pytest.mark.usefixtures("short_pauses")
# Files at the start: whether there are any, their width, eight rows twice.
CONNECTING = 18


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("qwen3", vocab_size=260, seed=2, tie_word_embeddings=False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def giving(server, tmp_path):
    server.states_folder = tmp_path / "states"
    server.states_folder.mkdir()
    return server


def configured(server: ModelServer, **changes) -> dict:
    """The teacher is named by its own folder, as its end is read here."""
    common = {"loss.objective": "reverse_kl", "teacher.model": str(server.folder), "training.max_steps": 2}
    return common | {"teacher.server": server.url} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss.objective": "forward_kl", "training.tokens_per_micro_batch": 40, "teacher.system_prompt": "Be brief."},
        {"loss.temperature": 2.0, "loss.importance_clip": None},
        SAMPLED | {"loss.baseline": "exact"},
        {"student.drop_layers": "auto:1"},
    ],
    ids=["reverse", "forward", "temperature", "baseline", "layers"],
)
def test_a_served_teacher_is_exact(giving, write_config, tmp_path, changes):
    """Every figure of a run with the teacher here, the weights, and no file is left."""
    changes = configured(giving, **changes)
    execute(write_config(changes | {"training.output_dir": str(tmp_path / "there")}))
    local = {"teacher.server": None, "teacher.server_gives": "auto", "training.output_dir": str(tmp_path / "here")}
    execute(write_config(changes | local))
    figures = ("loss", "reverse_kl", "reverse_kl_exact", "teacher_entropy", "top_token_agreement", "grad_norm")
    for one, other in zip(metrics_of(tmp_path / "there"), metrics_of(tmp_path / "here"), strict=True):
        for key in figures:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    theirs = weights_of(tmp_path / "here")
    for name, weight in weights_of(tmp_path / "there").items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=5e-5)
    ours, theirs = (read_json_lines(tmp_path / run / "evaluations.jsonl") for run in ("there", "here"))
    for one, other in zip(ours, theirs, strict=True):
        for key in ("reverse_kl", "teacher_entropy"):
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert not list(giving.states_folder.iterdir())
    assert run_charts(read_json_lines(tmp_path / "there" / "metrics.jsonl"), [])


def test_auto_takes_hidden_states_where_there_are_any(giving, write_config, tmp_path):
    execute(write_config(configured(giving, **{"training.output_dir": str(tmp_path / "hidden")})))
    assert metrics_of(tmp_path / "hidden")[0]["reverse_kl_exact"] is not None
    giving.states_folder = None
    execute(write_config(configured(giving, **{"training.output_dir": str(tmp_path / "top")})))
    assert metrics_of(tmp_path / "top")[0]["reverse_kl_exact"] is None
    assert any(body and body.get("prompt_logprobs") == 20 for _, body in giving.calls)
    assert [event["event"] for event in events_of(tmp_path / "top")] == ["teacher"]


@pytest.mark.parametrize("changes", [{"teacher.server_gives": "hidden"}, {"loss.temperature": 2.0}])
def test_a_server_that_has_none_is_refused_with_what_to_start(giving, write_config, capsys, changes):
    giving.states_folder = None
    changes |= {"loss.importance_clip": None}
    assert main(["--config", str(write_config(configured(giving, **changes)))]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "gives no hidden states" in said
    assert command(str(giving.folder), 3) in said


def test_files_that_come_late_or_half_or_not_change_no_number(giving, write_config, tmp_path):
    execute(write_config(configured(giving, **{"training.output_dir": str(tmp_path / "calm")})))
    giving.file_faults.extend([""] * CONNECTING + ["late", "half", "", "lost", "late", "half"])
    changes = {"training.output_dir": str(tmp_path / "rough"), "teacher.timeout_seconds": 1}
    execute(write_config(configured(giving, **changes)))
    assert not giving.file_faults
    assert metrics_of(tmp_path / "calm") == metrics_of(tmp_path / "rough")
    said = [event["message"] for event in events_of(tmp_path / "rough") if event["event"] == "server"]
    assert any("it is not whole" in message for message in said)
    assert any("it is not there" in message for message in said)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("others", "holds those of other tokens"),
        ("short", r"which holds a shape of \[\d+, 1, 32\], where \[\d+, 1, 'H'\] is meant"),
        ("nan", "hidden states that are not finite"),
    ],
)
def test_files_that_lie_end_the_run_before_they_are_trained_on(giving, write_config, tmp_path, capsys, fault, expected):
    giving.file_faults.extend([""] * (CONNECTING + 10) + [fault] * 20)
    assert main(["--config", str(write_config(configured(giving)))]) == 2
    assert re.search(expected, " ".join(capsys.readouterr().err.split()))


def test_what_is_read_and_not_what_was_asked_about_stays(giving, write_config):
    """The name of a file is what the server says, and could be any."""
    giving.file_faults.append("others")
    assert main(["--config", str(write_config(configured(giving)))]) == 2
    assert len(list(giving.states_folder.iterdir())) == 1


def test_another_layers_states_are_refused(giving, write_config, capsys):
    giving.layer = 0
    assert main(["--config", str(write_config(configured(giving)))]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"nats a token off its own, where 0.005 is allowed", said)
    assert '"eagle_aux_hidden_state_layer_ids": [3]' in said


def test_another_models_states_are_refused(giving, write_config, tmp_path, capsys):
    wide = tiny_model("qwen3", vocab_size=260, hidden_size=64)
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    changes = {"teacher.model": str(tmp_path / "wide")}
    assert main(["--config", str(write_config(configured(giving, **changes)))]) == 2
    assert "serves another model than teacher.model names" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("gives", ["hidden", "top_k"])
def test_a_server_that_comes_back_with_another_model_is_noticed(giving, write_config, capsys, gives):
    """Its tokens and its head are the same, so nothing else would tell."""

    def change() -> None:
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in giving.model.model.layers.parameters():
                parameter.add_(torch.randn_like(parameter))

    giving.faults.extend([None] * 26 + [change])
    assert main(["--config", str(write_config(configured(giving, **{"teacher.server_gives": gives})))]) == 2
    assert not giving.faults
    assert "it serves another model now" in " ".join(capsys.readouterr().err.split())


def test_a_file_of_another_user_is_said(giving, write_config, capsys, monkeypatch):
    """Who runs the tests may be root, who reads everything."""

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert main(["--config", str(write_config(configured(giving)))]) == 2
    assert "which only the server's user may read: be the same here" in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_is_not_shared_is_said(giving, write_config, tmp_path, capsys):
    giving.said_folder = tmp_path / "elsewhere"
    assert main(["--config", str(write_config(configured(giving)))]) == 2
    assert "a folder that is not here: both must see it under one path" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("tied", [True, False])
def test_the_end_of_a_checkpoint_in_many_files(tmp_path, tied):
    """Only the files that hold it are read: the others may be away."""
    model = tiny_model("qwen3", vocab_size=260, seed=2, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    files = list(tmp_path.glob("*.safetensors"))
    states = torch.randn(3, 32)
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(states))
    away = 0
    for file in files:
        kept = file.read_bytes()
        file.unlink()
        try:
            end = load_end(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
            away += 1
        except ModelError:
            file.write_bytes(kept)
    assert away == len(files) - 2  # those of the norm and of the head
    torch.testing.assert_close(end.head.logits(end.norm(states)), expected)
    assert end.num_layers == 3


# Their head does more, they know no model without layers, or their files name the head otherwise.
ENDS_UNKNOWN = {"modernbert-decoder", "bert", "gemma3n_text", "gpt_neox"}


@pytest.mark.parametrize("family", EXPECTED)
def test_the_end_of_every_family(family, tmp_path):
    """Right, or refused, or found out when it is compared with the server's own log-probabilities."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    model.save_pretrained(tmp_path)
    (parent, name), given = layer_stack(model, "the test"), []
    getattr(parent, name)[-1].register_forward_hook(lambda _, inputs, output: given.append(output))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 12)[None], use_cache=False).logits
        states = given[-1][0] if isinstance(given[-1], tuple) else given[-1]
        try:
            end = load_end(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
            gap = float((end.head.logits(end.norm(states.view(1, 7, -1))) - logits).abs().max())
        except (ModelError, RuntimeError):
            gap = float("inf")
    assert (gap < 1e-4) == (family not in ENDS_UNKNOWN)


def test_a_head_in_fewer_bits_than_the_servers_states(giving, write_config, tmp_path):
    """As where a GPU trains in bfloat16: what that rounds is no fault of the server's."""
    for precision in ("float32", "bfloat16"):
        changes = {"teacher.precision": precision, "training.output_dir": str(tmp_path / precision)}
        execute(write_config(configured(giving, **changes)))
    exact, rounded = (metrics_of(tmp_path / name)[0]["loss"] for name in ("float32", "bfloat16"))
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.05)


def test_a_model_whose_end_is_not_known_is_said(giving, write_config, monkeypatch, capsys):
    def fail(*_, **__):
        raise ModelError("no norm that could be found")

    monkeypatch.setattr("distill.teachers.local.load_end", fail)
    assert main(["--config", str(write_config(configured(giving)))]) == 2
    assert "found; its hidden states are of no use then: set teacher.server_gives to top_k" in capsys.readouterr().err


def test_a_finished_run_is_evaluated_with_its_teachers_server(giving, write_config, tmp_path, capsys):
    """As with the teacher here; a server that says too little is told, and one that samples is not asked."""
    execute(write_config(configured(giving)))
    common = ["--run", str(tmp_path / "run"), "--num-rollouts", "2", "--max-new-tokens", "8"]
    found = []
    for name, more in (("there", []), ("here", ["--teacher", str(giving.folder)])):
        assert evaluate([*common, *more, "--json", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name).read_text()))
    for figure in ("reverse_kl", "forward_kl", "top_token_agreement", "teacher_perplexity"):
        assert found[0][figure]["mean"] == pytest.approx(found[1][figure]["mean"], rel=1e-4), figure
    assert evaluate([*common, "--sample-from", "teacher"]) == 2
    assert "is on a server" in capsys.readouterr().err
    giving.states_folder = None
    assert evaluate(common) == 2
    assert "or give --teacher MODEL" in capsys.readouterr().err
