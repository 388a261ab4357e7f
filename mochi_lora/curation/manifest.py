"""The tables between the steps: JSONL under `prepare.folder`, one clip a line. Sole owner of their names and columns.

split.jsonl     every clip of every shot, with its measures
clips.jsonl     what the filter kept; `data.clips` takes it as it is, `caption` fills its column text
texts.jsonl     every caption there was when the filter ran last, of clips that are no more too
refused.jsonl   what it did not keep, each with its reason
footage.jsonl   what became of each source: shots, clips, or why it cannot be used
filter.json     what each limit was cut from
written.jsonl   the clips of clips.jsonl as the filter wrote them last: what differs there is a person's work (see `by_hand`)
by_hand.jsonl   what people decided in clips.jsonl: clips that are out, crops of their own
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mochi_lora.curation.clip_measures import ClipMeasures
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import write_text

SPLIT, KEPT, REFUSED, TEXTS = "split.jsonl", "clips.jsonl", "refused.jsonl", "texts.jsonl"
FOOTAGE, DISTRIBUTIONS = "footage.jsonl", "filter.json"
WRITTEN, BY_HAND = "written.jsonl", "by_hand.jsonl"

Key = tuple[str, float, float]  # file_name, start, end


@dataclass(frozen=True)
class Clip:
    """One line. `file_name` is relative to the table, or absolute."""

    file_name: str
    start: float
    end: float
    text: str
    source: str  # the original file, as the footage folder names it
    shot: int
    measures: ClipMeasures
    crop: tuple[int, int, int, int] | None = None
    flags: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.source}@{self.start:g}s"

    @property
    def key(self) -> Key:
        """What makes it this clip, whatever is said of it."""
        return (self.file_name, self.start, self.end)

    def to_row(self) -> dict[str, Any]:
        """JSON, in the order people read it."""
        return {
            "file_name": self.file_name,
            "start": self.start,
            "end": self.end,
            "text": self.text,
            "crop": None if self.crop is None else list(self.crop),
            "source": self.source,
            "shot": self.shot,
            "measures": self.measures.to_row(),
            "flags": list(self.flags),
            "refused": self.refused,
        }


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_clips(path: Path, made_by: str) -> list[Clip]:
    """Clips of a table. Raises UserError where it is not there, DamagedFileError naming the line that is none of ours."""
    if not path.is_file():
        message = f"{path}: not there yet; run {made_by} first"
        raise UserError(message)
    clips = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            clips.append(_clip(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            message = f"{path}:{number}: not a clip as `{made_by}` writes it ({error}); delete the file and run that again"
            raise DamagedFileError(message) from error
    return clips


def _clip(row: dict[str, Any]) -> Clip:
    crop = row["crop"]
    return Clip(
        file_name=row["file_name"],
        start=float(row["start"]),
        end=float(row["end"]),
        text=row["text"],
        source=row["source"],
        shot=row["shot"],
        measures=ClipMeasures.from_row(row["measures"]),
        crop=None if crop is None else (crop[0], crop[1], crop[2], crop[3]),
        flags=tuple(row["flags"]),
        refused=row["refused"],
    )


def read_texts(folder: Path) -> dict[Key, str]:
    """Every caption that the tables in `folder` hold, by `Clip.key`; texts.jsonl counts for clips that are in neither other.

    Raises DamagedFileError naming the line that cannot be read.
    """
    texts: dict[Key, str] = {}
    for name in (TEXTS, REFUSED, KEPT):
        texts |= _texts_of(folder / name)
    return {key: text for key, text in texts.items() if text}


def _texts_of(table: Path) -> dict[Key, str]:
    return {key: row.get("text") or "" for key, (_, row) in keyed_rows(table).items()}


def keyed_rows(table: Path) -> dict[Key, tuple[int, dict[str, Any]]]:
    """(number of the line, row) by `Clip.key`, of a table that people may have changed; nothing where there is none.

    Raises DamagedFileError naming the line that cannot be read.
    """
    rows: dict[Key, tuple[int, dict[str, Any]]] = {}
    if not table.is_file():
        return rows
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[row["file_name"], float(row["start"]), float(row["end"])] = (number, row)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            message = (
                f"{table}:{number}: cannot be read ({error}), and may hold a person's work; mend the line or move the file away"
            )
            raise DamagedFileError(message) from error
    return rows


def write_texts(folder: Path, texts: Mapping[Key, str]) -> None:
    """Before the tables are written: a kill between two of them, or a split that has a clip no longer, loses no caption."""
    rows = [{"file_name": name, "start": start, "end": end, "text": text} for (name, start, end), text in sorted(texts.items())]
    if rows or (folder / TEXTS).is_file():
        write_table(folder / TEXTS, rows)


def with_texts(clips: Sequence[Clip], texts: Mapping[Key, str]) -> list[Clip]:
    """`clips` with their captions of `texts`; those without one keep what they have."""
    return [replace(clip, text=texts.get(clip.key) or clip.text) for clip in clips]


def without_clip(texts: Mapping[Key, str], clips: Sequence[Clip]) -> list[Key]:
    """Captions that no clip has, itself or another of its source: a file's `.txt` is the caption of all its clips."""
    said = {(clip.file_name, clip.text) for clip in clips}
    there = {clip.key for clip in clips}
    return [key for key, text in texts.items() if key not in there and (key[0], text) not in said]


def name_in_table(path: Path, folder: Path) -> str:
    """`path` as a table in `folder` names it: relative where the two lie side by side and can move together, else absolute."""
    path, folder = path.resolve(), folder.resolve()
    return os.path.relpath(path, folder) if path.is_relative_to(folder.parent) else str(path)
