"""The tables between the steps: JSONL under `prepare.folder`, one clip a line. Sole owner of their names and columns.

split.jsonl     every clip of every shot, with its measures
clips.jsonl     what the filter kept; `data.clips` takes it as it is, `caption` fills its column text
refused.jsonl   what it did not keep, each with its reason
footage.jsonl   what became of each source: shots, clips, or why it cannot be used
filter.json     what each limit was cut from
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mochi_lora.curation.clip_measures import ClipMeasures
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import write_text

SPLIT, KEPT, REFUSED, FOOTAGE, DISTRIBUTIONS = "split.jsonl", "clips.jsonl", "refused.jsonl", "footage.jsonl", "filter.json"


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
    def key(self) -> tuple[str, float, float]:
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


def with_texts_of(clips: Sequence[Clip], table: Path) -> list[Clip]:
    """`clips` with the captions that an earlier `table` has for them: a second filtering loses no caption.

    Raises DamagedFileError naming the line that cannot be read.
    """
    if not table.is_file():
        return list(clips)
    texts: dict[tuple[str, float, float], str] = {}
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts[row["file_name"], float(row["start"]), float(row["end"])] = row.get("text") or ""
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            message = f"{table}:{number}: cannot be read ({error}), and may hold a caption; mend the line or move the file away"
            raise DamagedFileError(message) from error
    return [replace(clip, text=texts.get(clip.key) or clip.text) for clip in clips]


def name_in_table(path: Path, folder: Path) -> str:
    """`path` as a table in `folder` names it: relative where the two lie side by side and can move together, else absolute."""
    path, folder = path.resolve(), folder.resolve()
    return os.path.relpath(path, folder) if path.is_relative_to(folder.parent) else str(path)
