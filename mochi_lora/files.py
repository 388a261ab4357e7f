"""Files written so that a kill or a full disk never leaves half of one under its final name.

Write beside the target, flush to disk, rename: readers see the old content or the new, nothing between. A kill leaves at
most a `*.tmp-<pid>-<n>` file, which the next writer of the same folder may delete.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mochi_lora.errors import UserError

_counter = itertools.count()
_HASH_BLOCK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def out_of_space_named(path: Path) -> Iterator[None]:
    """Turn "no space left on device" into a `UserError` that names `path`; every other error passes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise DiskFullError(
            f"{path}: the disk is full; free some space or move the folder, then run the command again"
        ) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    # safetensors keeps no errno; Rust's text for every error of the system ends in its number.
    return any(f"(os error {number})" in str(error) for number in _FULL)


class DiskFullError(UserError):
    """No space left. Never swallowed by a per-clip boundary: the next clip would fail as well."""


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and rename the result to `path`; on any failure the temporary file is removed.

    Who may read the file is as for any new one; safetensors alone would make it its owner's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{next(_counter)}")
    with out_of_space_named(path):
        try:
            temporary.touch()
            permissions = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(permissions)
            sync_to_disk(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_to_disk(path.parent)


@contextmanager
def only_one(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder` against a second process; the system lets go when we die.

    Somebody else who has it is waited for with `wait`, and a UserError without.

    The lock lies beside the folder, which may be renamed or not be there yet.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{folder}: another process is {what} here; wait for it, stop it, or choose another folder"
            raise UserError(message) from error
        yield


def remove_abandoned(folder: Path, *, older_than_seconds: float = 0.0) -> None:
    """Delete the temporary files that kills left anywhere under `folder`; give an age where others may be writing."""
    for path in folder.rglob("*.tmp-*"):
        if path.is_file() and time.time() - path.stat().st_mtime >= older_than_seconds:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 under `path`, atomically."""
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401 - JSON is any
    """`content` as indented JSON under `path`, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_of(content: Any) -> str:  # noqa: ANN401 - JSON is any
    """Hexadecimal SHA-256 of `content` as canonical JSON (sorted keys)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Force a file or a folder entry to disk, so that the rename cannot overtake the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
