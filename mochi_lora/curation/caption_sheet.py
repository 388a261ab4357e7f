"""captions.jsonl: what the model said of each clip, for a person to correct. Sole owner of its columns.

Without a model the clips that have no caption get empty lines to fill in; one that stays empty says nothing.
Lines are appended, each with one write, so that a kill loses at most the clips being asked about. A person changes `text`
in any editor; a line whose text is no longer the one written last is a correction, `edited` set or not. Corrections are
taken over once, win over everything, and are never written again by us.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mochi_lora.errors import DamagedFileError
from mochi_lora.files import digest_of, out_of_space_named, sync_to_disk, write_text

SHEET = "captions.jsonl"

Key = tuple[Path, float, float | None]  # absolute path, start, end


@dataclass(frozen=True)
class Line:
    """One clip. What a hand-written line leaves out has its default."""

    file_name: str  # relative to the sheet, or absolute
    text: str
    start: float = 0.0
    end: float | None = None
    raw: str = ""  # the answer before any rule
    model: str = ""
    tokens: int = 0  # T5's, of `text`
    edited: bool = False
    finished: bool = True  # False where the answer hit caption.answer_tokens
    refused: str | None = None  # why the answer is no caption
    asked: str = ""  # digest of model and question
    written: str = ""  # digest of `text` as it was last written or taken over
    more: Mapping[str, Any] = field(default_factory=dict)  # columns of somebody else, kept

    @property
    def corrected(self) -> bool:
        """Whether a person has changed the text since."""
        return self.written != text_digest(self.text)

    @property
    def waiting(self) -> bool:
        """Whether it was laid out for a person, who has not written anything yet; no model was asked."""
        return not (self.asked or self.edited or self.corrected)

    def key(self, folder: Path) -> Key:
        """The clip, for a sheet in `folder`."""
        return ((folder / self.file_name).resolve(), self.start, self.end)

    def taken_over(self, tokens: int) -> "Line":
        """The correction is known from now on."""
        return replace(self, edited=True, refused=None, tokens=tokens, written=text_digest(self.text))

    def to_json(self) -> str:
        """One line, in the order people read it."""
        told = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "more"}
        return json.dumps({**told, **self.more}, ensure_ascii=False) + "\n"


def text_digest(text: str) -> str:
    """12 hexadecimal digits."""
    return digest_of(text.strip())[:12]


def read_sheet(path: Path) -> dict[Key, Line]:
    """Lines by clip; of two for one clip the correction counts, else the later. Empty where there is no sheet.

    A last line that a kill has torn (no line break, no closing brace) is cut off the file. Raises DamagedFileError naming
    any other line that cannot be read: it may hold a person's work.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        whole, _, tail = content.rpartition(b"\n")
        mended = content + b"\n" if tail.rstrip().endswith(b"}") else whole + b"\n" * bool(whole)
        write_text(path, mended.decode(encoding="utf-8"))
    found: dict[Key, Line] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not text.strip():
            continue
        line = _parse(text, f"{path}:{number}")
        key = line.key(path.parent)
        known = found.get(key)
        if known is None or not (known.corrected or known.edited) or line.corrected:
            found[key] = line
    return found


def _parse(text: str, where: str) -> Line:
    try:
        row = json.loads(text)
        own = {part.name for part in fields(Line)} - {"more"}
        line = Line(**{name: value for name, value in row.items() if name in own}, more=_others(row, own))
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        message = f'{where}: cannot be read ({error}); expected {{"file_name": ..., "start": ..., "end": ..., "text": ...}}'
        raise DamagedFileError(f"{message}: mend the line, or delete it to have the clip captioned again") from error
    numbers = (line.start, line.end if line.end is not None else 0.0)
    if not isinstance(line.file_name, str) or not isinstance(line.text, str) or not all(map(_is_number, numbers)):
        message = f"{where}: file_name and text must be text, start and end seconds; mend the line"
        raise DamagedFileError(message)
    return line


def _others(row: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in own}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def append_line(path: Path, line: Line) -> None:
    """With one write to the end of the file, and on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with out_of_space_named(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.to_json().encode())
        finally:
            os.close(descriptor)
        sync_to_disk(path)


def write_sheet(path: Path, lines: Mapping[Key, Line]) -> None:
    """All lines anew, atomically."""
    write_text(path, "".join(line.to_json() for line in lines.values()))
