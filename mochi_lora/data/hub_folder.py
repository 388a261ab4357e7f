"""A Hugging Face dataset saved with `save_to_disk`, read as rows of `file_name` and `text`. Decodes nothing itself.

`datasets` would decode video through torchcodec, which does not import beside a CPU torch: `decode=False` keeps it out.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from mochi_lora.data.media import MEDIA_SUFFIXES
from mochi_lora.errors import UserError
from mochi_lora.files import write_atomic


def rows_of_saved_dataset(folder: Path) -> tuple[list[tuple[str, Mapping[str, Any]]], list[tuple[str, str]]]:
    """(place, row) with `file_name` relative to `folder`, as a table has it; and (place, reason) of rows without media.

    Media embedded as bytes are written once to `<folder>/.extracted/<sha256>.<suffix>` and named from there.
    Raises UserError where there is no column `text`, or not exactly one Video or Image column (or `file_name`).
    """
    dataset = datasets.load_from_disk(str(folder))
    features = dataset.features
    media = [name for name, feature in features.items() if isinstance(feature, datasets.Video | datasets.Image)]
    if "text" not in features or (len(media) != 1 and "file_name" not in features):
        found = ", ".join(f"{name} ({feature})" for name, feature in features.items())
        expected = "a column text and one Video or Image column (or file_name)"
        raise UserError(f"data.clips: {folder}: expected {expected}; found: {found}")
    if len(media) != 1:
        return [(f"{folder} row {number}", row) for number, row in enumerate(dataset)], []
    column = media[0]
    is_video = isinstance(features[column], datasets.Video)
    kind = datasets.Video(decode=False) if is_video else datasets.Image(decode=False)
    rows: list[tuple[str, Mapping[str, Any]]] = []
    without_media = []
    for number, row in enumerate(dataset.cast_column(column, kind)):
        where = f"{folder} row {number}"
        path = _media_path(row[column], folder, ".mp4" if is_video else ".png")
        if path is None:
            without_media.append((where, f"column {column} holds neither bytes nor the path of an existing file"))
        else:
            rows.append((where, {**row, "file_name": path}))
    return rows, without_media


def _media_path(cell: Mapping[str, Any] | None, folder: Path, default_suffix: str) -> str | None:
    if cell is None:
        return None
    name, content = cell.get("path"), cell.get("bytes")
    if content is not None:
        suffix = Path(name).suffix.lower() if name else ""
        suffix = suffix if suffix in MEDIA_SUFFIXES else default_suffix
        target = folder / ".extracted" / f"{hashlib.sha256(content).hexdigest()}{suffix}"
        if not target.exists():
            write_atomic(target, lambda temporary: _write_bytes(temporary, content))
        return str(target.relative_to(folder))
    if name and (folder / name).is_file():
        return str(name)
    return None


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
