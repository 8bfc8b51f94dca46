"""Checkpoints: a folder of safetensors and JSON, complete or absent, with a digest of every file.

A checkpoint is written to a temporary folder, flushed, and renamed; over ranks by all of them, and whole or absent all
the same. One that is damaged is skipped with a warning and the one before it is used. No file is ever unpickled. Random
numbers need no state here: every draw is a function of the seed and of what is drawn.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.config import Config
from distill.run import tensor_files
from distill.run.identity import Identity
from distill.runtime import Processes

MANIFEST = "manifest.json"
WRITING_ERRORS = (OSError, SafetensorError)  # safetensors has an exception of its own

# Keys whose change leaves every number of a continued run as it would have been.
HARMLESS = {
    "teacher.offload",
    "teacher.server",
    "teacher.timeout_seconds",
    "teacher.retries",
    "prompts.streaming",
    "rollout.server",
    "rollout.timeout_seconds",
    "rollout.retries",
    "training.output_dir",
    "training.save_every",
    "training.keep_last",
    "training.resume",
    "training.eval_every",
    "training.max_bad_steps",
    "training.report_to",
    "training.hub_id",
    "training.hub_private",
    "training.early_stopping",
    "training.accept_changed_rewards",
    "training.parallel",  # but for rounding, as for the number of ranks
    "training.rank_timeout_s",
}
# Harmless unless the learning rate depends on where the run ends.
LENGTH = {"training.max_steps", "training.num_epochs"}
NATIVE = {"native", "auto"}  # values of rollout.engine: a run that can be native is so with either


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason."""


class Checkpoint(NamedTuple):
    """One checkpoint, found sound; its weights and moments are still on disk."""

    path: Path
    state: dict[str, Any]
    shapes: dict[str, torch.Size]
    """Of each weight NAME and of Adam's moments NAME/MOMENT, as they are in one piece."""
    rollouts: dict[str, dict[str, Tensor]]
    """The rollouts in hand, and those sampled ahead."""

    @property
    def step(self) -> int:
        position = self.state["trainer"]["position"]
        return position["step"] + position.get("warm", 0)

    @property
    def metrics(self) -> Path:
        """The metrics of every step up to this one."""
        return self.path / "metrics.jsonl"

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Copies the weights and moments that are named into tensors of any placement. Raises `CheckpointError`."""
        try:
            tensor_files.read(self.path, into)
        except OSError as error:
            raise CheckpointError(str(error)) from error


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep_last: int,
    *,
    best: int | None = None,
    metrics: Path | None = None,
    ranks: Processes | None = None,
) -> Path:
    """Writes `folder/step-NNNNNN` with the groups of `tensors` and a copy of `metrics`; all `ranks` must ask for it.

    Then removes all checkpoints but the last ones and that of step `best`. When writing fails, on whichever rank,
    nothing is removed but what was half written.
    """
    ranks, target = ranks or Processes(), _path(folder, step)
    partial = folder / f".{target.name}.partial"

    def begin() -> None:
        if ranks.rank:
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensor_files.write_whole_groups(partial, tensors, ranks.size)
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        if metrics is not None:
            shutil.copyfile(metrics, partial / "metrics.jsonl")

    def finish() -> None:
        if ranks.rank == 0:
            _finish(partial, target, digests)
            for old in list_checkpoints(folder)[:-keep_last]:
                if best is None or old != _path(folder, best):
                    _remove(old)

    try:
        ranks.together(begin, WRITING_ERRORS)
        own = tensor_files.write_own_part(partial, tensors, ranks.rank) if ranks.size > 1 else []
        written = ranks.of_all(ranks.together(lambda: {path.name: _sha256(path) for path in own}, WRITING_ERRORS))
        digests = {name: digest for of_rank in written for name, digest in of_rank.items()}
        ranks.together(finish, WRITING_ERRORS)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _finish(partial: Path, target: Path, digests: dict[str, str]) -> None:
    """Makes a checkpoint of what all ranks have written, given the digests that they know."""
    if missing := [name for name in digests if not (partial / name).exists()]:
        raise OSError(
            f"rank 0 does not see {missing[0]}, which another rank wrote: all ranks need the same folder there, on a "
            f"file system that their machines share"
        )
    digests = {path.name: digests.get(path.name) or _sha256(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    if target.exists():
        _remove(target)
    os.replace(partial, target)
    _flush(target.parent)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and _step(path) is not None), key=_step)


def load(checkpoint: Path, *, verify: bool = True) -> Checkpoint:
    """Opens one checkpoint. Raises `CheckpointError` if anything in it is wrong, as far as `verify` looks."""
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        whole = isinstance(digests, dict) and "state.json" in digests and tensor_files.all_listed(digests)
        if not whole or any(Path(name).name != name for name in digests):
            raise CheckpointError(f"{checkpoint / MANIFEST} does not list the files of a checkpoint")
        if strange := {path.name for path in checkpoint.glob("*.safetensors")} - set(digests):
            raise CheckpointError(f"{checkpoint / min(strange)} was not written with the others")
        for name, digest in digests.items() if verify else ():
            if _sha256(checkpoint / name) != digest:
                raise CheckpointError(f"{checkpoint / name} is damaged: its SHA-256 is not the one written with it")
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        shapes, rollouts = tensor_files.shapes_of(checkpoint), tensor_files.read_whole_groups(checkpoint)
        return Checkpoint(checkpoint, state, shapes, rollouts)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: {error}. One is a folder such as RUN/checkpoints/step-000100"
        ) from error


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint under `folder`, or None where there is none at all.

    Warns of each that is damaged. Raises `CheckpointError` when all are: to start over would lose what they hold.
    """
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            return load(checkpoint)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
    if found:
        raise CheckpointError(
            f"{folder}: none of the {len(found)} checkpoints there is sound. Put back a copy of one, or set "
            f"training.resume to never: that starts over and keeps this folder under another name"
        )
    return None


def find(resume: str, own: Path) -> Checkpoint | None:
    """The checkpoint to continue from, of `training.resume` and a run's own checkpoints, if there is one."""
    if resume == "never":
        return None
    if resume == "auto":
        return load_newest(own)
    found = load(Path(resume))
    if newer := newer_than(own, found.step):
        raise CheckpointError(
            f"training.resume: {found.path} is older than {newer[-1]}, which would be overwritten. Set "
            f"training.resume to auto to continue from the newest, or name another training.output_dir"
        )
    return found


def newer_than(folder: Path, step: int) -> list[Path]:
    """Finished checkpoints past `step`, oldest first."""
    return [path for path in list_checkpoints(folder) if _step(path) > step]


def set_aside_newer(folder: Path, step: int) -> None:
    """Renames checkpoints past `step`, which were found damaged, so that they count no more and are not lost."""
    for path in newer_than(folder, step):
        kept = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(kept, ignore_errors=True)
        path.rename(kept)


def accept(
    found: Checkpoint,
    config: Config,
    prompts: Identity,
    student: nn.Module,
    reward_files: Mapping[str, str],
    answers: str = "",
) -> None:
    """Refuses a checkpoint of a run that this one would not continue truly, naming each key, column and file."""
    state = found.state
    if missing := {"trainer", "config", "prompts", "rollout_precision", "evaluations", "samples"} - set(state):
        raise CheckpointError(f"{found.path / 'state.json'} lacks {', '.join(sorted(missing))}")
    changed = changed_keys(state["config"], config.model_dump(mode="json"))
    changed += prompts.differences(state, config.prompts.train)
    if answers != state.get("answers", answers):
        changed.append(f"the answers in {config.prompts.answers or config.prompts.train} are others than before")
    if not config.training.accept_changed_rewards:
        changed += _changed_files(state.get("reward_files", {}), reward_files)
    if changed:
        raise CheckpointError(
            f"{found.path} is of a run that this configuration would not continue truly:\n  "
            + "\n  ".join(changed)
            + "\nSet training.resume to never to start over, or name another training.output_dir"
        )
    _check_fits(found, {name: p for name, p in student.named_parameters() if p.requires_grad})


def _changed_files(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """The functions of `rewards` in both whose file, by its SHA-256, is another one."""
    return [
        f"rewards: the file of {reference} has changed since (its SHA-256 began {saved[reference][:8]}, now "
        f"{digest[:8]}): put it back, or set training.accept_changed_rewards to go on with the new one"
        for reference, digest in current.items()
        if saved.get(reference, digest) != digest
    ]


def _check_fits(found: Checkpoint, trained: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` unless the checkpoint's weights have the names and shapes of those `trained`."""
    saved = {name: shape for name, shape in found.shapes.items() if "/" not in name}
    wrong = [name for name in {*saved, *trained} if name not in saved or name not in trained]
    wrong = wrong or [name for name, shape in saved.items() if shape != trained[name].shape]
    wrong = wrong or [name for name in found.shapes if name.partition("/")[0] not in trained]
    if wrong:
        raise CheckpointError(
            f"{found.path} is of another student: {len(wrong)} tensors differ, {min(wrong)} among them. "
            f"Has the model's folder changed since?"
        )


def _remove(checkpoint: Path) -> None:
    # Under another name first, so that a kill leaves no half of it that looks like a checkpoint.
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _step(path: Path) -> int | None:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def changed_keys(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two resolved configurations and matters, as `section.key: old, now new`.

    A key that the saved one does not have is younger than it, and its default is what was done before.
    """
    harmless = HARMLESS if current["training"]["lr_schedule"] != "constant" else HARMLESS | LENGTH
    changed = []
    if (old := saved.get("rewards", [])) != current.get("rewards", []):
        changed.append(f"rewards: was {old!r}, now {current['rewards']!r}")
    for section, keys in current.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            old = saved.get(section, {}).get(key, _default(section, key))
            same = value == old or (f"{section}.{key}" == "rollout.engine" and {value, old} == NATIVE)
            if f"{section}.{key}" == "teacher.others":
                same = _others(value) == _others(old)
            if not same and f"{section}.{key}" not in harmless:
                changed.append(f"{section}.{key}: was {old!r}, now {value!r}")
    return changed


def _others(teachers: Any) -> Any:
    """`teacher.others` without what is harmless of a teacher."""
    if not isinstance(teachers, dict):
        return teachers
    return {
        name: {key: value for key, value in one.items() if f"teacher.{key}" not in HARMLESS}
        if isinstance(one, dict)
        else one
        for name, one in teachers.items()
    }


def _default(section: str, key: str) -> Any:
    """What a key means to a run that began before the key existed."""
    sections = Config.model_fields
    keys = sections[section].annotation.model_fields if section in sections else {}
    if key not in keys or keys[key].is_required():
        return None
    return to_jsonable_python(keys[key].get_default(call_default_factory=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
