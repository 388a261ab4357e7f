"""The two places that a model's files can be put: hugging face's cache, and a plain folder."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import write_json, write_text
from mochi_lora.model.transfer import RemoteFile, partial_of

RECORD = "download.json"  # in a plain folder: the model and the commit that it is of


@dataclass(frozen=True)
class Place:
    """Where a repository's files go: hugging face's cache (content under `blobs`, names as links), or a plain folder."""

    folder: Path
    blobs: Path | None = None

    def content(self, file: RemoteFile) -> Path:
        """Where the bytes lie."""
        return self.blobs / file.digest if self.blobs else self.folder / file.path

    def received(self, file: RemoteFile) -> int:
        """Bytes that are here, of a broken transfer as well."""
        content = self.content(file)
        path = content if content.is_file() else partial_of(content)
        return min(path.stat().st_size, file.size) if path.is_file() else 0

    def holds(self, file: RemoteFile) -> bool:
        """Whether the whole file is here, by its size.

        Enough because only what had the right checksum gets its name, and a plain folder is of one commit (`RECORD`).
        """
        content = self.content(file)
        return content.is_file() and content.stat().st_size == file.size

    def show(self, file: RemoteFile) -> None:
        """Give the content its name in the repository. Raises UserError on a disk without symbolic links."""
        shown = self.folder / file.path
        if self.blobs is None or shown.is_file():
            return
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.unlink(missing_ok=True)  # a link to content that was deleted
        try:
            shown.symlink_to(os.path.relpath(self.content(file), shown.parent))
        except OSError as error:
            message = f"{shown}: this disk takes no symbolic links ({error.strerror}), and the cache is made of them"
            raise UserError(f"{message}; use mochi-lora download --to FOLDER") from error

    def free_bytes(self) -> int:
        """Space left on the disk."""
        there = self.folder.absolute()
        while not there.exists():
            there = there.parent
        return shutil.disk_usage(there).free


def cache_of(base: str) -> Path:
    """The folder of one model in hugging face's cache (layout: huggingface_hub's guide "Understand caching")."""
    return Path(constants.HF_HUB_CACHE) / f"models--{base.replace('/', '--')}"


def in_cache(base: str, commit: str) -> Place:
    """The place of a model's files in hugging face's cache."""
    return Place(cache_of(base) / "snapshots" / commit, cache_of(base) / "blobs")


def cached_commit(base: str, revision: str | None) -> str | None:
    """The commit that `revision` stood for when something of it was fetched last, if anything was. Asks no network."""
    asked = revision or constants.DEFAULT_REVISION
    if (cache_of(base) / "snapshots" / asked).is_dir():
        return asked
    reference = cache_of(base) / "refs" / asked
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def recorded(folder: Path) -> tuple[str, str] | None:
    """(model, commit) of a plain folder; None where nothing says. Raises DamagedFileError."""
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        base, commit = content["base"], content["commit"]
        if isinstance(base, str) and isinstance(commit, str):
            return base, commit
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    message = f"{path}: does not say what was downloaded here; expected base and commit as JSON"
    raise DamagedFileError(f"{message}; delete it, and the files are checked by their checksums")


def record(place: Place, base: str, commit: str) -> None:
    """Note in a plain folder what it is of. In hugging face's cache the names of the folders say so."""
    if place.blobs is None and recorded(place.folder) is None:
        write_json(place.folder / RECORD, {"base": base, "commit": commit})


def remember(base: str, asked: str, commit: str) -> None:
    """Note in hugging face's cache which commit the branch or tag `asked` stands for."""
    if asked != commit:
        write_text(cache_of(base) / "refs" / asked, commit)
