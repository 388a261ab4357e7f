"""Which clips there are and what their captions say. Opens no video; `data.probe` does that.

A source is a folder of media with same-stem `.txt` captions, a CSV or JSONL table, or a Hugging Face `datasets` folder.
What is wrong with one clip becomes a `Rejection`; what is wrong with the whole input is a `UserError`.
"""

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mochi_lora.data.media import IMAGE_SUFFIXES, MEDIA_SUFFIXES, shown_name
from mochi_lora.errors import ClipError, UserError

_TABLE_COLUMNS = ("file_name", "text")
_SEPARATORS = re.compile(r"[\s,]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What in a folder of clips says more than the clips do: a table, or a data set that `datasets` saved.
CSV_TABLE, JSONL_TABLE = TABLES = ("metadata.csv", "metadata.jsonl")
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_SHARD = re.compile(r"-\d+-of-\d+$")
_ACCEPTED = "a folder of clips with same-stem .txt captions, a .csv or .jsonl table, or a Hugging Face datasets folder"


@dataclass(frozen=True)
class ClipSource:
    """One clip to encode: a file, or a range of it in seconds from its first frame (`end` exclusive, None is all)."""

    path: Path
    caption: str
    start: float = 0.0
    end: float | None = None
    crop: tuple[int, int, int, int] | None = None  # left, top, right, bottom (exclusive) in pixels as shown; None is all
    video: str | None = None  # path or SHA-256 of the video that the file itself was cut from, where a table says so

    @property
    def name(self) -> str:
        """For people: the path, with the start time if there is one."""
        return f"{self.path}@{self.start:g}s" if self.start else str(self.path)


@dataclass(frozen=True)
class Rejection:
    """A clip left out: which, and why with what to change."""

    name: str
    reason: str

    @classmethod
    def of(cls, source: ClipSource, error: ClipError) -> "Rejection":
        """Reports have a column for the name: it is not repeated in the reason."""
        return cls(source.name, str(error).removeprefix(f"{source.name}: ").removeprefix(f"{source.path}: "))


class _UnusableError(ValueError):
    """Why one clip is left out; becomes its `Rejection`."""


Found = tuple[list[ClipSource], list[Rejection]]


def list_sources(clips: Path) -> Found:
    """Every usable clip under `clips` and every unusable one, both sorted. The kind of input is seen from the path.

    Raises UserError where nothing can be listed: no such path, no media, not a table, wrong columns.
    """
    if not clips.exists():
        raise UserError(f"data.clips: {clips} does not exist; expected {_ACCEPTED}")
    sources, rejections = _list_folder(clips) if clips.is_dir() else _list_table(clips)
    if not sources and not rejections:
        raise UserError(f"data.clips: no clips in {clips}; expected {_ACCEPTED} (media: {' '.join(sorted(MEDIA_SUFFIXES))})")
    sources.sort(
        key=lambda source: (source.path.as_posix(), source.start, source.end or 0.0, source.caption, source.crop or ())
    )
    rejections.sort(key=lambda rejection: (rejection.name, rejection.reason))
    return sources, rejections


def _list_folder(folder: Path) -> Found:
    info, several = (folder / name for name in SAVED_DATASET)
    if several.exists():
        splits = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        raise UserError(f"data.clips: {folder} holds several splits ({splits}); name one of them, such as {folder / 'train'}")
    if info.exists() and (folder / "state.json").exists():
        from mochi_lora.data.hub_folder import rows_of_saved_dataset  # noqa: PLC0415 - datasets takes seconds to import

        rows, without_media = rows_of_saved_dataset(folder)
        return _from_rows(rows, [Rejection(where, reason) for where, reason in without_media], folder)
    for name in TABLES:
        if (folder / name).exists():
            return _list_table(folder / name)
    if files := sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet")):
        return _list_parquet(files, folder)
    found = _list_media(folder)
    below = [] if found[0] else sorted(path for name in TABLES for path in folder.glob(f"[!.]*/{name}"))
    if len(below) > 1:
        tables = ", ".join(str(path.relative_to(folder)) for path in below)
        raise UserError(f"data.clips: {folder} holds several tables ({tables}); name one of them, such as {below[0]}")
    return _list_table(below[0]) if below else found


def _list_parquet(files: list[Path], folder: Path) -> Found:
    """One split as `push_to_hub` leaves it: `train-00000-of-00002.parquet` and so on."""
    splits = sorted({_SHARD.sub("", file.stem) for file in files})
    if len(splits) > 1:
        raise UserError(
            f"data.clips: {folder} holds several splits ({', '.join(splits)}) as parquet; name the file of one, such as "
            f"{files[0]}, or put the files of one into a folder of their own"
        )
    from mochi_lora.data.hub_folder import rows_of_parquet  # noqa: PLC0415 - datasets takes seconds to import

    rows, without_media = rows_of_parquet(files, folder)
    return _from_rows(rows, [Rejection(where, reason) for where, reason in without_media], folder)


def _list_media(folder: Path) -> Found:
    """Media with captions beside them. Hidden files and folders are not looked at (`._clip.mp4` of macOS is no clip)."""
    sources, rejections = [], []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in MEDIA_SUFFIXES or not path.is_file():
            continue
        if (shown := shown_name(path)) is not None:
            rejections.append(Rejection(shown, "its path is not UTF-8; rename it"))
            continue
        try:
            sources.append(ClipSource(path, _required_caption(path)))
        except (_UnusableError, ClipError) as error:
            rejections.append(Rejection(str(path), str(error)))
    return sources, rejections


def caption_beside(media: Path) -> str | None:
    """What the same-stem `.txt` says, stripped; None where there is none. Raises ClipError where it is not UTF-8."""
    path = media.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ClipError(f"caption {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _required_caption(media: Path) -> str:
    caption = caption_beside(media)
    if caption is None:
        raise _UnusableError(f"no caption: write one into {media.with_suffix('.txt')}")
    if not caption:
        raise _UnusableError(f"caption {media.with_suffix('.txt')} is empty: write what the clip shows")
    return caption


def _list_table(table: Path) -> Found:
    if table.suffix.lower() == ".parquet":
        return _list_parquet([table], table.parent)
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    read = readers.get(table.suffix.lower())
    if read is None:
        raise UserError(f"data.clips: {table} is neither a .csv nor a .jsonl table; expected {_ACCEPTED}")
    try:
        return _from_rows(*read(table), table.parent)
    except UnicodeDecodeError as error:
        raise UserError(f"data.clips: {table} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


Rows = tuple[list[tuple[str, Mapping[str, Any]]], list[Rejection]]


def _read_csv(table: Path) -> Rows:
    with table.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        _require_columns(table, reader.fieldnames or ())
        try:
            return [(f"{table}:{reader.line_num}", row) for row in reader], []
        except csv.Error as error:
            raise UserError(f"data.clips: {table}:{reader.line_num} cannot be read as CSV ({error})") from error


def _read_jsonl(table: Path) -> Rows:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    rejections = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{table}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            rejections.append(Rejection(where, f"not JSON ({error}): write one object per line"))
            continue
        if isinstance(row, dict):
            rows.append((where, row))
        else:
            rejections.append(Rejection(where, 'not a JSON object: write {"file_name": ..., "text": ...}'))
    if rows:
        _require_columns(table, {key for _, row in rows for key in row})
    return rows, rejections


def _require_columns(table: Path, found: Iterable[str]) -> None:
    columns = list(found)
    missing = [column for column in _TABLE_COLUMNS if column not in columns]
    if missing:
        raise UserError(
            f"data.clips: {table} has no column {' and '.join(missing)}; found: {', '.join(sorted(columns)) or 'none'}. "
            "Expected file_name and text (and, if wanted, start and end in seconds, crop in pixels, source)."
        )


def _from_rows(rows: list[tuple[str, Mapping[str, Any]]], rejections: list[Rejection], folder: Path) -> Found:
    sources = []
    for where, row in rows:
        try:
            sources.append(_from_row(row, folder))
        except _UnusableError as error:
            rejections.append(Rejection(f"{folder / str(row.get('file_name') or '')} ({where})", str(error)))
    return sources, rejections


def _from_row(row: Mapping[str, Any], folder: Path) -> ClipSource:
    name, text = row.get("file_name"), row.get("text")
    if not isinstance(name, str) or not name.strip():
        raise _UnusableError("file_name is empty: write the clip's path, relative to the table")
    if not isinstance(text, str) or not text.strip():
        raise _UnusableError("caption is empty: write what the clip shows into the column text")
    path = folder / name.strip()
    if path.suffix.lower() not in MEDIA_SUFFIXES:
        raise _UnusableError(f"not a video or image by its name; expected one of {' '.join(sorted(MEDIA_SUFFIXES))}")
    if not path.is_file():
        raise _UnusableError(f"no such file; file_name is relative to {folder}")
    start, end = _seconds(row, "start"), _seconds(row, "end")
    if (start or 0) < 0 or (end is not None and end <= (start or 0)):
        raise _UnusableError(f"start {start}, end {end}: expected 0 <= start < end, in seconds")
    if (start or end) and path.suffix.lower() in IMAGE_SUFFIXES:
        raise _UnusableError("an image has no start and end: leave them empty")
    return ClipSource(path, text.strip(), start or 0.0, end, _crop(row), _video(row))


def _seconds(row: Mapping[str, Any], column: str) -> float | None:
    """A table cell as seconds; None where it is empty or the column is not there."""
    cell = row.get(column)
    if cell is None or cell == "":
        return None
    try:
        value = float("nan") if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        value = float("nan")
    if not math.isfinite(value):
        raise _UnusableError(f"{column} {cell!r}: write seconds as a number, or leave it empty")
    return value


def _crop(row: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """The column crop: `[left, top, right, bottom]`, as a list or as text, with or without brackets and commas."""
    cell = row.get("crop")
    if cell is None or cell in ("", []):
        return None
    parts = _SEPARATORS.split(cell.strip(" []")) if isinstance(cell, str) else cell
    try:
        left, top, right, bottom = (_whole(part) for part in parts)
    except (TypeError, ValueError):
        left = top = right = bottom = -1
    if not (0 <= left < right and 0 <= top < bottom):
        raise _UnusableError(f"crop {cell!r}: expected [left, top, right, bottom] in pixels, right and bottom exclusive")
    return left, top, right, bottom


def _whole(part: Any) -> int:  # noqa: ANN401 - a table cell
    """An integer, also as text or as a float (tables of numbers know no other). Raises ValueError."""
    if isinstance(part, bool) or not float(part).is_integer():
        raise ValueError(part)
    return int(float(part))


def _video(row: Mapping[str, Any]) -> str | None:
    """The column source, if it names a video file or is a SHA-256. Any other (`pexels`) tells no two videos apart."""
    cell = row.get("source")
    if not isinstance(cell, str):
        return None
    name = cell.strip()
    return name if Path(name).suffix.lower() in MEDIA_SUFFIXES or is_sha256(name) else None


def is_sha256(text: str) -> bool:
    """Whether `text` is a SHA-256 in hexadecimal, as the column source may hold."""
    return _SHA256.fullmatch(text) is not None
