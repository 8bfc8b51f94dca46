"""Checkpoints: whole or absent, verified, pruned; logs that a kill cut short."""

import json
import shutil

import pytest
import torch

from distill.run import CheckpointError, checkpoint
from distill.runtime import JsonLines, read_json_lines


def save(folder, step, value=1.0, keep_last=2):
    tensors = {"student": {"w": torch.full((3,), value)}, "optimizer": {"w/step": torch.tensor(4.0)}}
    return checkpoint.save(folder, step, tensors, {"step": step}, keep_last)


def test_what_is_saved_is_loaded(tmp_path):
    found = checkpoint.load(save(tmp_path, 7))
    assert found.state == {"step": 7}
    assert found.shapes == {"w": (3,), "w/step": ()}
    into = {"w": torch.zeros(3), "w/step": torch.zeros(())}
    found.read(into)
    assert torch.equal(into["w"], torch.ones(3))
    assert into["w/step"] == 4
    assert {path.name for path in (tmp_path / "step-000007").iterdir()} == {
        "student.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000003", "step-000010"]
    assert checkpoint.load_newest(tmp_path).state == {"step": 10}


@pytest.mark.parametrize("name", ["student.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    else:
        path.unlink()
    with pytest.warns(UserWarning, match="trying the checkpoint before it"):
        assert checkpoint.load_newest(tmp_path).state == {"step": 1}


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors", "state.json"])
def test_a_list_that_lacks_a_file_is_not_believed(tmp_path, name):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    listed = json.loads((folder / "manifest.json").read_text())
    del listed[name]
    (folder / "manifest.json").write_text(json.dumps(listed))
    (folder / name).unlink()
    with pytest.warns(UserWarning, match="does not list the files of a checkpoint; trying the checkpoint before it"):
        assert checkpoint.load_newest(tmp_path).state == {"step": 1}


def test_a_file_of_tensors_from_elsewhere_is_not_read(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    shutil.copyfile(tmp_path / "step-000001/student.safetensors", tmp_path / "step-000002/shard-00001.safetensors")
    with pytest.warns(UserWarning, match="was not written with the others; trying the checkpoint before it"):
        assert checkpoint.load_newest(tmp_path).state == {"step": 1}


def test_what_another_rank_wrote_has_to_be_there(tmp_path):
    """On another machine, that is, in a folder of the same name."""
    (tmp_path / "partial").mkdir()
    with pytest.raises(OSError, match=r"rank 0 does not see shard-2\.safetensors, which another rank wrote"):
        checkpoint._finish(tmp_path / "partial", tmp_path / "step-000001", {"shard-2.safetensors": "0"})


def test_a_save_that_was_killed_leaves_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-000002.partial").mkdir()
    (tmp_path / ".step-000002.partial" / "student.safetensors").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path).state == {"step": 1}
    save(tmp_path, 2)  # and does not stand in the way of the next one
    assert checkpoint.load_newest(tmp_path).state == {"step": 2}


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 1, 2.0)
    weight = torch.zeros(3)
    checkpoint.load_newest(tmp_path).read({"w": weight})
    assert weight[0] == 2


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.load_newest(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "absent")


def test_changes_that_matter_are_named():
    saved = {"training": {"seed": 0, "max_steps": 5, "save_every": 1, "lr_schedule": "constant"}, "loss": {"beta": 0.5}}
    current = json.loads(json.dumps(saved))
    current["training"] |= {"max_steps": 9, "save_every": 3}
    assert checkpoint.changed_keys(saved, current) == []
    current["training"]["seed"], current["loss"]["beta"] = 1, 0.4
    assert checkpoint.changed_keys(saved, current) == [
        "training.seed: was 0, now 1",
        "loss.beta: was 0.5, now 0.4",
    ]
    # A key that did not exist when the run began had its default.
    current["loss"] |= {"beta": 0.5, "discount": 0.0}
    current["training"]["seed"] = 0
    assert checkpoint.changed_keys(saved, current) == []
    current["loss"]["discount"] = 0.5
    assert checkpoint.changed_keys(saved, current) == ["loss.discount: was 0.0, now 0.5"]
    # Where the learning rate depends on the last step, its number matters.
    saved["training"]["lr_schedule"] = current["training"]["lr_schedule"] = "cosine"
    assert "training.max_steps: was 5, now 9" in checkpoint.changed_keys(saved, current)


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = JsonLines(path, keep=lambda record: record["step"] <= 2)
    log.write([{"step": 3, "loss": float("nan"), "of": {"loss": float("inf")}}])
    log.close()
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None, "of": {"loss": None}}]
