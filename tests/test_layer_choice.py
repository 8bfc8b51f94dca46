"""`student.drop_layers: auto:N`: the layers that are missed least are found, kept, and used again on resume."""

import json

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from test_train import execute, metrics_of

import distill.run.parts
from distill.config import load_config
from distill.run import CheckpointError
from distill.runtime import read_json_lines
from distill.train import main


@pytest.fixture
def idle(tmp_path):
    """A model of 5 layers, of which 1 and 3 add next to nothing."""
    model = tiny_model("llama", vocab_size=264, num_hidden_layers=5)
    with torch.no_grad():
        for index, size in ((1, 0.0), (3, 1e-3)):
            for linear in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
                linear.weight *= size
    model.save_pretrained(tmp_path / "idle")
    tiny_tokenizer().save_pretrained(tmp_path / "idle")
    return {"student.model": str(tmp_path / "idle"), "teacher.model": str(tmp_path / "idle")}


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (2, [1, 3]), (4, None)])
def test_the_layers_that_do_least_are_dropped(write_config, idle, count, expected, tmp_path, capsys):
    changes = idle | {"student.drop_layers": f"auto:{count}", "training.max_steps": 1}
    assert main(["--config", str(write_config(changes))]) == 0
    chosen = json.loads((tmp_path / "run" / "layers.json").read_text())
    assert len(chosen["dropped"]) == count
    assert expected is None or chosen["dropped"] == expected
    exported = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert exported["num_hidden_layers"] == 5 - count
    assert [each["layer"] for each in chosen["single_layers"]][:2] == [1, 3]
    values = [each["reverse_kl"] for each in chosen["sets"]]
    assert values == sorted(values)
    # What was measured of the set that won is what the run then measures of its student.
    own = next(each["held_out_reverse_kl"] for each in chosen["sets"] if each["layers"] == chosen["dropped"])
    assert own == read_json_lines(tmp_path / "run" / "evaluations.jsonl")[0]["reverse_kl"]
    assert own == min(each["held_out_reverse_kl"] for each in chosen["sets"] if each["held_out_reverse_kl"] is not None)
    assert f"dropping {chosen['dropped']}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("lora", [{}, {"student.lora.rank": 2}])
def test_a_resumed_run_takes_the_same_layers_without_a_second_search(write_config, idle, lora, tmp_path, monkeypatch):
    changes = idle | lora | {"student.drop_layers": "auto:2", "training.save_every": 2, "training.keep_last": 9}
    whole = execute(write_config(changes))
    assert load_config(whole.output.path / "config.yaml").student.drop_layers == "auto:2"
    monkeypatch.setattr(distill.run.parts, "choose_layers", None)
    with pytest.raises(CheckpointError, match=r"student\.drop_layers: was 'auto:2', now 'auto:1'"):
        execute(write_config(changes | {"student.drop_layers": "auto:1"}))
    resumed = {"training.resume": str(whole.output.path / "checkpoints" / "step-000002")}
    again = execute(write_config(changes | resumed | {"training.output_dir": str(tmp_path / "resumed")}))
    assert metrics_of(again.output.path) == metrics_of(whole.output.path)
    ours, theirs = whole.parts.student.state_dict(), again.parts.student.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (again.output.path / "layers.json").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"student.drop_layers": "auto:5"}, "auto:5 leaves nothing of a model of 5 layers"),
        ({"student.drop_layers": "auto:2", "prompts.eval": None}, "auto:2 measures on held-out prompts, but"),
        ({"student.drop_layers": "auto"}, "student.drop_layers: found 'auto'"),
    ],
)
def test_what_cannot_be_chosen_is_one_message(write_config, idle, changes, expected, capsys):
    assert main(["--config", str(write_config(idle | changes))]) == 2
    assert expected in capsys.readouterr().err
