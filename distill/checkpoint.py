"""Checkpoints: a folder of safetensors and JSON, complete or absent, with a digest of every file.

A checkpoint is written to a temporary folder, flushed, and renamed. One that is damaged is skipped with a warning
and the one before it is used. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.config import Config

MANIFEST = "manifest.json"

# Keys whose change leaves every number of a continued run as it would have been.
HARMLESS = {
    "training.output_dir",
    "training.save_every",
    "training.keep_last",
    "training.resume",
    "training.eval_every",
    "rollout.memory_gib",
}
# Harmless unless the learning rate depends on where the run ends.
LENGTH = {"training.max_steps", "training.num_epochs"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason."""


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep_last: int) -> Path:
    """Writes `folder/step-NNNNNN` with one safetensors file a group of tensors, then removes all but the last ones."""
    target = folder / f"step-{step:06d}"
    partial = folder / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, group in tensors.items():
        save_file(
            {key: value.detach().contiguous().cpu() for key, value in group.items()}, partial / f"{name}.safetensors"
        )
    (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    digests = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the state of one checkpoint. Raises `CheckpointError` if anything in it is wrong."""
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in digests.items():
            if _sha256(checkpoint / name) != digest:
                raise CheckpointError(f"{checkpoint / name} is damaged: its SHA-256 is not the one written with it")
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        names = [name for name in digests if name.endswith(".safetensors")]
        return {name.removesuffix(".safetensors"): load_file(checkpoint / name) for name in names}, state
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {error}") from error


def load_newest(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest sound checkpoint under `folder` as `load` returns it, or None. Warns of each that is damaged."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return load(checkpoint)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
    return None


def changed_keys(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two resolved configurations and matters, as `section.key: old, now new`."""
    harmless = HARMLESS if current["training"]["lr_schedule"] != "constant" else HARMLESS | LENGTH
    changed = []
    for section, keys in current.items():
        for key, value in keys.items():
            old = saved.get(section, {}).get(key, _default(section, key))
            if value != old and f"{section}.{key}" not in harmless:
                changed.append(f"{section}.{key}: was {old!r}, now {value!r}")
    return changed


def _default(section: str, key: str) -> Any:
    """What a key means to a run that began before the key existed."""
    field = Config.model_fields[section].annotation.model_fields.get(key)
    return None if field is None else field.default


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
