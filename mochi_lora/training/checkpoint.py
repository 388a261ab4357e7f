"""A run's full state on disk: a named dictionary, written whole or not at all, checked before it is believed.

    <run>/checkpoints/step-000200/<name>.safetensors   a dictionary of tensors
                                  <name>.pt            a nested state dictionary (the optimiser's), read with weights_only
                                  <name>.json          plain values
                                  manifest.json        step, schema, SHA-256 of every file

Base weights are not in it. A kill leaves at most a `*.tmp-*` folder, removed at the next start.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mochi_lora.console import console
from mochi_lora.errors import DamagedFileError
from mochi_lora.files import out_of_space_named, sha256_of_file, sync_to_disk, write_json

SCHEMA = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """One state as read back."""

    step: int
    state: dict[str, Any]
    manifest: str  # SHA-256 of the manifest, which has that of every file: who reads the same has the same


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write `state` as `folder/step-<step>`, then delete all but the newest `keep`. Returns the path."""
    target = _path(folder, step)
    temporary = folder / f"{target.name}.tmp-{os.getpid()}"
    with out_of_space_named(target):
        try:
            temporary.mkdir(parents=True)
            for name, content in state.items():
                _write(temporary, name, content)
            hashes = {path.name: sha256_of_file(path) for path in sorted(temporary.iterdir())}
            write_json(temporary / _MANIFEST, {"schema": SCHEMA, "step": step, "files": hashes})
            _publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    # Newer ones can only be damaged (we resumed before them): they must not push out what we wrote.
    for old in [path for number, path in _steps(folder) if number <= step][:-keep]:
        _discard(old)
    return target


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest state whose checksums hold; damaged newer ones are named on the console.

    None when there is no checkpoint at all. Raises DamagedFileError when there are some and none is whole.
    """
    steps = _steps(folder)
    for step, path in reversed(steps):
        try:
            return _read_whole(path, step)
        except DamagedFileError as error:
            console.print(f"{error}; trying the checkpoint before it", style="yellow", markup=False)
    if steps:
        message = f"{folder}: none of its {len(steps)} checkpoints is whole; start over with --fresh"
        raise DamagedFileError(message)
    return None


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """The state after `step` steps, looked for by its name. Raises DamagedFileError where it is not there, or not whole."""
    path = _path(folder, step)
    if not path.is_dir():
        message = f"{path}: no such checkpoint"
        raise DamagedFileError(message)
    return _read_whole(path, step)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def remove_torn(folder: Path) -> None:
    """Delete what a kill left half-written or half-deleted; one process only, before any of them reads."""
    if folder.is_dir():
        for path in folder.glob("step-*.tmp-*"):
            shutil.rmtree(path)


def _discard(path: Path) -> None:
    """Out of the way in one rename, then deleted: a kill leaves nothing that looks like a damaged checkpoint."""
    doomed = path.with_name(f"{path.name}.tmp-old-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _publish(temporary: Path, target: Path) -> None:
    """Flush, rename. A damaged checkpoint of the same step (we resumed before it) makes room first."""
    for path in temporary.iterdir():
        sync_to_disk(path)
    if target.exists():
        _discard(target)
    temporary.rename(target)
    sync_to_disk(target.parent)


def _write(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, folder / f"{name}.safetensors")
    elif _holds_tensor(content):
        buffer = io.BytesIO()  # torch's own file writer hides the errno of a full disk
        torch.save(content, buffer)
        (folder / f"{name}.pt").write_bytes(buffer.getbuffer())
    else:
        write_json(folder / f"{name}.json", content)


def _holds_tensor(content: object) -> bool:
    if isinstance(content, Mapping):
        return any(_holds_tensor(value) for value in content.values())
    if isinstance(content, list | tuple):
        return any(_holds_tensor(value) for value in content)
    return isinstance(content, torch.Tensor)


def _read(path: Path) -> Any:  # noqa: ANN401 - whatever was saved
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    return json.loads(path.read_text(encoding="utf-8"))


def _read_whole(path: Path, step: int) -> Checkpoint:
    files, manifest = _verified(path)
    return Checkpoint(step, {file.stem: _read(file) for file in files}, manifest)


def _verified(path: Path) -> tuple[list[Path], str]:
    """The files of one checkpoint, each with the content the manifest asks for, and its hash. Raises DamagedFileError."""
    try:
        written = (path / _MANIFEST).read_bytes()
        manifest = json.loads(written)
        schema, hashes = manifest["schema"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: damaged checkpoint (no readable manifest: {error})"
        raise DamagedFileError(message) from error
    if schema != SCHEMA:
        message = f"{path}: checkpoint schema {schema}, this version reads {SCHEMA}"
        raise DamagedFileError(message)
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or sha256_of_file(file) != expected:
            message = f"{path}: damaged checkpoint ({name} does not match its checksum)"
            raise DamagedFileError(message)
    return [path / name for name in hashes], hashlib.sha256(written).hexdigest()
