"""The tensors of a checkpoint's folder, all safetensors: written by one process or by every rank, read by any number.

One process writes a file for each group of tensors. Over ranks, weights and moments go through
`torch.distributed.checkpoint`: each rank writes one file with its shards, or its share of what all have, and none holds
more than that. Its Hugging Face format is the one that needs no pickled metadata: a shard's place stands in its file.
"""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

SHARED_OUT = ("student", "optimizer")  # groups of which each rank writes a part; their names differ
WHOLE = ("rollouts", "next_rollouts")  # groups that every rank has


def write_whole_groups(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], size: int) -> None:
    """Writes a file for each group of which no rank but the first of `size` writes anything. Raises `OSError`."""
    for name, group in groups.items():
        if size == 1 or name not in SHARED_OUT:
            plain = {key: value.detach().contiguous().cpu() for key, value in group.items()}
            save_file(plain, folder / f"{name}.safetensors")


def write_own_part(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], rank: int) -> list[Path]:
    """Writes this rank's part of the other groups, for which all ranks must ask; returns its files.

    Raises `OSError` on all ranks where one fails.
    """
    tensors = {key: value for name in SHARED_OUT for key, value in groups[name].items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        distributed_checkpoint.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        failed, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"{getattr(reason, 'strerror', None) or reason} (on rank {failed})") from error
    return list(folder.glob(f"shard-{rank + 1:05d}-*"))


def all_listed(names: Collection[str]) -> bool:
    """Whether the files of every group that is shared out can be among these: one process's, or those of ranks."""
    return {f"{group}.safetensors" for group in SHARED_OUT} <= set(names) or any(n.startswith("shard-") for n in names)


def shapes_of(folder: Path) -> dict[str, torch.Size]:
    """The shape of every tensor of the groups that are shared out, in one piece, by its name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    whole = {index.fqn for index, at in metadata.storage_data.items() if Path(at.relative_path).stem in WHOLE}
    return {name: about.size for name, about in metadata.state_dict_metadata.items() if name not in whole}


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Copies the tensors that are named into those given, of a shard its part. Raises `OSError`."""
    try:
        with warnings.catch_warnings():  # every rank reads for itself, as one process alone would
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            distributed_checkpoint.load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise OSError(f"{folder} could not be read: {reason}") from error


def read_whole_groups(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The groups that every rank has."""
    found = {name: folder / f"{name}.safetensors" for name in WHOLE}
    return {name: load_file(path) for name, path in found.items() if path.exists()}
