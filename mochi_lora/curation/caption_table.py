"""The clips that are captioned, and where their captions go: a JSONL table's column `text`, or `.txt` files beside media."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mochi_lora.curation.caption_sheet import Key
from mochi_lora.data.media import MEDIA_SUFFIXES
from mochi_lora.data.sources import CSV_TABLE, JSONL_TABLE, SAVED_DATASET, ClipSource, Found, Rejection, caption_beside
from mochi_lora.errors import ClipError, UserError
from mochi_lora.files import write_text

_ACCEPTED = "expected a folder of clips, or a .jsonl table with a column file_name"
_FOREIGN_FILES = (CSV_TABLE, *SAVED_DATASET)


def key_of(clip: ClipSource) -> Key:
    """The clip, whatever its table calls it."""
    return (clip.path.resolve(), clip.start, clip.end)


def list_captionable(clips: Path) -> Found:
    """Every clip of a folder or table, without those refused by the filter, and those whose caption cannot be read.

    Raises UserError where it is neither folder nor table.
    """
    table = _table_of(clips)
    if table is None:
        return _in_folder(clips)
    found = [_from_row(row, table, number) for number, row in _rows(table) if not row.get("refused")]
    return sorted(found, key=lambda clip: (clip.path, clip.start)), []  # a file's clips together: one look into it


def _in_folder(clips: Path) -> Found:
    found: list[ClipSource] = []
    unreadable: list[Rejection] = []
    for path in sorted(clips.rglob("*")):
        if path.suffix.lower() not in MEDIA_SUFFIXES or not path.is_file() or _hidden(path, clips):
            continue
        try:
            found.append(ClipSource(path, caption_beside(path) or ""))
        except ClipError as error:  # it may hold a person's words: never captioned over
            unreadable.append(Rejection(str(path), str(error)))
    return found, unreadable


def store_captions(clips: Path, captions: Mapping[Key, str]) -> None:
    """Write these captions to where `list_captionable(clips)` reads them; what is the same already is not written again."""
    table = _table_of(clips)
    if table is None:
        for (path, _, _), caption in captions.items():
            if (caption_beside(path) or "") != caption:
                write_text(path.with_suffix(".txt"), caption + "\n")
        return
    before = table.read_text(encoding="utf-8-sig")
    lines = before.split("\n")
    for number, row in _rows(table):
        key = key_of(_from_row(row, table, number))
        if key in captions and row.get("text") != captions[key]:
            lines[number - 1] = json.dumps({**row, "text": captions[key]}, ensure_ascii=False)
    after = "\n".join(lines)
    if after != before:
        write_text(table, after)


def _table_of(clips: Path) -> Path | None:
    """The table, None for a folder of media."""
    if clips.is_dir():
        for name in _FOREIGN_FILES:
            if (clips / name).exists():
                message = f"caption.clips: {clips} holds {name}, into which no captions can be written; {_ACCEPTED}"
                raise UserError(message)
        table = clips / JSONL_TABLE
        return table if table.exists() else None
    if not clips.is_file() or clips.suffix.lower() != ".jsonl":
        problem = "is no .jsonl table" if clips.exists() else "does not exist"
        raise UserError(f"caption.clips: {clips} {problem}; {_ACCEPTED}")
    return clips


def _rows(table: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, row). Raises UserError naming a line that is no JSON object: it would be lost in rewriting."""
    found = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"caption.clips: {table}:{number} is not JSON ({error}); mend or delete the line") from error
        if not isinstance(row, dict):
            raise UserError(f"caption.clips: {table}:{number} is not a JSON object; mend or delete the line")
        found.append((number, row))
    return found


def _from_row(row: Mapping[str, Any], table: Path, number: int) -> ClipSource:
    name, start, end, crop = row.get("file_name"), row.get("start"), row.get("end"), row.get("crop")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"caption.clips: {table}:{number} has no file_name; write the clip's path, relative to the table")
    try:
        left, top, right, bottom = (int(edge) for edge in crop) if crop else (0, 0, 0, 0)
        return ClipSource(
            table.parent / name.strip(),
            str(row.get("text") or "").strip(),
            float(start or 0.0),
            None if end in (None, "") else float(end),
            (left, top, right, bottom) if crop else None,
        )
    except (TypeError, ValueError) as error:
        message = f"caption.clips: {table}:{number} is no clip ({error}); expected file_name, and start, end, crop if wanted"
        raise UserError(message) from error


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
