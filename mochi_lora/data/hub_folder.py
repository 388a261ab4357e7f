"""A Hugging Face dataset saved with `save_to_disk`, or as the parquet files of `push_to_hub`, read as rows of `file_name` and
`text`. Decodes nothing itself.

`datasets` would decode video through torchcodec, which does not import beside a CPU torch: `decode=False` keeps it out.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from mochi_lora.data.media import MEDIA_SUFFIXES
from mochi_lora.errors import UserError
from mochi_lora.files import write_atomic

_TABLE_COLUMNS = ("file_name", "text", "start", "end", "crop", "source")


Found = tuple[list[tuple[str, Mapping[str, Any]]], list[tuple[str, str]]]


def rows_of_parquet(files: Sequence[Path], folder: Path) -> Found:
    """As `rows_of_saved_dataset`, of the parquet files of one split; what is embedded goes to `<folder>/.extracted`."""
    names = [str(file) for file in files]
    return _rows(_load(folder, lambda: datasets.Dataset.from_parquet(names)), folder)


def rows_of_saved_dataset(folder: Path) -> Found:
    """(place, row) with `file_name` relative to `folder`, as a table has it; and (place, reason) of rows without media.

    Media embedded as bytes are written once to `<folder>/.extracted/<sha256>.<suffix>` and named from there; a row keeps
    none of them, nor any column that a table does not have.
    Raises UserError where there is no column `text`, or not exactly one Video or Image column (or `file_name`); where the
    dataset cannot be read, or `.extracted` not be written.
    """
    return _rows(_load(folder, lambda: datasets.load_from_disk(str(folder))), folder)


def _rows(dataset: datasets.Dataset, folder: Path) -> Found:
    features = dataset.features
    media = [name for name, feature in features.items() if isinstance(feature, datasets.Video | datasets.Image)]
    if "text" not in features or (len(media) != 1 and "file_name" not in features):
        found = ", ".join(f"{name} ({feature})" for name, feature in features.items())
        expected = "a column text and one Video or Image column (or file_name)"
        raise UserError(f"data.clips: {folder}: expected {expected}; found: {found}")
    kept = [name for name in _TABLE_COLUMNS if name in features]
    if len(media) != 1:
        return [(f"{folder} row {number}", row) for number, row in enumerate(dataset.select_columns(kept))], []
    column = media[0]
    is_video = isinstance(features[column], datasets.Video)
    kind = datasets.Video(decode=False) if is_video else datasets.Image(decode=False)
    rows: list[tuple[str, Mapping[str, Any]]] = []
    without_media = []
    for number, row in enumerate(dataset.select_columns([*kept, column]).cast_column(column, kind)):
        where = f"{folder} row {number}"
        path = _media_path(row[column], folder, ".mp4" if is_video else ".png")
        if path is None:
            without_media.append((where, f"column {column} holds neither bytes nor the path of an existing file"))
        else:
            rows.append((where, {name: row[name] for name in kept} | {"file_name": path}))
    return rows, without_media


def _load(folder: Path, load: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    try:
        return load()
    # pyarrow's and json's, and datasets' where a key is missing or parquet breaks off
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {error}"
        message = f"data.clips: {folder}: damaged or incomplete Hugging Face dataset ({reason}); save or copy it there again"
        raise UserError(message) from error


def _media_path(cell: Mapping[str, Any] | None, folder: Path, default_suffix: str) -> str | None:
    if cell is None:
        return None
    name, content = cell.get("path"), cell.get("bytes")
    if content is not None:
        suffix = Path(name).suffix.lower() if name else ""
        suffix = suffix if suffix in MEDIA_SUFFIXES else default_suffix
        target = folder / ".extracted" / f"{hashlib.sha256(content).hexdigest()}{suffix}"
        if not target.exists():
            _extract(target, content, folder)
        return str(target.relative_to(folder))
    if name and (folder / name).is_file():
        return str(name)
    return None


def _extract(target: Path, content: bytes, folder: Path) -> None:
    try:
        write_atomic(target, lambda temporary: _write_bytes(temporary, content))
    except OSError as error:
        raise UserError(
            f"data.clips: {folder}: its embedded media cannot be written to {target.parent} ({error.strerror}); copy the "
            "dataset to a folder that you may write to and name that one"
        ) from error


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
