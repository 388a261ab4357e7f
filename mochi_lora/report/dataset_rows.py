"""What the sheet of a data set says of each clip: its plan, its caption, what its table notes, and what stands out."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mochi_lora.curation.caption_table import list_captionable
from mochi_lora.curation.manifest import FOOTAGE, KEPT, REFUSED, Clip, read_clips
from mochi_lora.data.clip_plan import ClipPlan
from mochi_lora.data.sources import JSONL_TABLE, SAVED_DATASET, TABLES, ClipSource
from mochi_lora.data.trigger import called_parts, calls
from mochi_lora.errors import DamagedFileError

NO_TRIGGER = "without the trigger"
SAME_CAPTION = "caption of another clip"
CUT_CAPTION = "caption too long"
UNKNOWN_WORDS = "words unknown to T5"
LITTLE_MOTION = "little motion"
UNREADABLE = "cannot be read"
FILTER_REFUSED = "refused by the filter"
TRIMMED = "trimmed"
_STILL_BESIDE_OTHERS = 0.2  # of the median motion of the data set
_EDGES = 4  # of a crop
_NOT_SHOWN = ("width", "height")  # of a table's measures; the plan says them

Key = tuple[Path, float, float | None]  # absolute path, start, end


@dataclass(frozen=True)
class Note:
    """What the columns measures, flags and refused of a table hold for a clip, if it has them."""

    measures: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Counted:
    """A caption as T5 sees it."""

    tokens: int  # at most 256
    truncated: bool
    unknown_share: float


@dataclass(frozen=True)
class ClipRow:
    """One clip that `encode` would take."""

    plan: ClipPlan
    part: int
    trigger: str = ""
    counted: Counted | None = None
    note: Note = field(default_factory=Note)
    marks: tuple[str, ...] = ()
    strip: str = ""  # frames side by side, as a data URI; "" where the page carries none
    unreadable: str = ""  # why its frames could not be shown

    @property
    def used_seconds(self) -> float:
        """Of the clip, in training."""
        return self.plan.seconds - self.plan.unused_seconds

    @property
    def motion(self) -> float | None:
        """As `prepare` measures it: percent of the short side per 1/8 s."""
        return self.note.measures.get("motion")

    @property
    def film(self) -> str:
        """The video that the clip was cut from, as far as the table says."""
        return self.plan.source.video or str(self.plan.source.path)

    @property
    def caption_parts(self) -> list[tuple[str, bool]]:
        """The caption in pieces, each with whether it is the trigger."""
        return called_parts(self.plan.source.caption, self.trigger)


@dataclass(frozen=True)
class LeftOut:
    """A clip or video that is not trained on."""

    name: str
    reason: str
    source: ClipSource | None = None  # what a person could still decide about, to be looked at
    strip: str = ""  # as that of a row
    unreadable: str = ""


@dataclass(frozen=True)
class Limits:
    """Where a clip begins to stand out."""

    unknown_share: float  # encode.unknown_token_limit
    motion: float | None  # filter.min_motion


def key_of(source: ClipSource) -> Key:
    """The clip, whatever its table calls it."""
    return (source.path.resolve(), source.start, source.end)


def read_notes(clips: Path) -> dict[Key, Note]:
    """Measures, flags and refusals by clip of a JSONL table that has such columns; nothing for any other kind of input.

    Lines that `data.sources` refuses are passed over: it names them.
    """
    return {key_of(source): _note(row) for _, source, row in _rows_of(clips)}


def uncaptioned(clips: Path) -> dict[str, ClipSource]:
    """Clips that have no caption yet, of a folder or JSONL table, by the name under which `data.sources` leaves them out."""
    if clips.is_dir() and not any((clips / name).exists() for name in (*TABLES, *SAVED_DATASET)):
        return {str(clip.path): clip for clip in list_captionable(clips)[0] if not clip.caption}
    return {name: source for name, source, _ in _rows_of(clips) if not source.caption and source.path.is_file()}


def _rows_of(clips: Path) -> Iterator[tuple[str, ClipSource, Mapping[str, object]]]:
    table = clips / JSONL_TABLE if clips.is_dir() else clips
    if table.suffix.lower() != ".jsonl" or not table.is_file():
        return
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        try:
            row = json.loads(line)
            path, end, crop = table.parent / row["file_name"].strip(), row.get("end"), row.get("crop")
            source = ClipSource(
                path,
                str(row.get("text") or "").strip(),
                float(row.get("start") or 0.0),
                None if end in (None, "") else float(end),
                (crop[0], crop[1], crop[2], crop[3]) if isinstance(crop, list) and len(crop) == _EDGES else None,
            )
        except (json.JSONDecodeError, TypeError, ValueError, KeyError, AttributeError):
            continue
        yield f"{table.parent / row['file_name']} ({table}:{number})", source, row


def _note(row: Mapping[str, object]) -> Note:
    measures, flags, refused = (row.get(column) for column in ("measures", "flags", "refused"))
    numbers = measures.items() if isinstance(measures, dict) else ()
    return Note(
        {name: float(value) for name, value in numbers if _is_number(value) and name not in _NOT_SHOWN},
        tuple(str(flag) for flag in flags) if isinstance(flags, list) else (),
        str(refused) if refused else None,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def left_out_before(clips: Path) -> list[LeftOut]:
    """What `prepare` left out on the way to this table of its own: videos, then clips. Raises DamagedFileError."""
    if clips.name != KEPT:
        return []
    refused = clips.with_name(REFUSED)
    filtered = read_clips(refused, "mochi-lora prepare --only filter") if refused.is_file() else []
    return [*_videos(clips.with_name(FOOTAGE)), *(_refused(clip, refused.parent) for clip in filtered)]


def _refused(clip: Clip, folder: Path) -> LeftOut:
    source = ClipSource(folder / clip.file_name, clip.text, clip.start, clip.end, clip.crop)
    return LeftOut(clip.name, clip.refused or "", source)


def _videos(path: Path) -> Iterable[LeftOut]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.is_file() else (), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "refused" in row:
                yield LeftOut(row["source"], row["refused"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            message = f"{path}:{number}: not as `mochi-lora prepare` writes it ({error}); delete the file and run that again"
            raise DamagedFileError(message) from error


def motion_limit(rows: Sequence[ClipRow], least: float | None) -> float | None:
    """Motion below which a clip stands out: a fifth of the median of all, `least` at least; None if none is measured."""
    known = [row.motion for row in rows if row.motion is not None]
    return max(_STILL_BESIDE_OTHERS * statistics.median(known), least or 0.0) if known else None


def marked(rows: Sequence[ClipRow], limits: Limits) -> list[ClipRow]:
    """`rows`, each with what stands out about it: what a person should look at first, then the flags of its table."""
    captions = Counter(_plain(row) for row in rows)
    still = motion_limit(rows, limits.motion)
    found = []
    for row in rows:
        counted = row.counted or Counted(0, truncated=False, unknown_share=0.0)
        asked = (
            (NO_TRIGGER, not calls(row.plan.source.caption, row.trigger)),
            (SAME_CAPTION, captions[_plain(row)] > 1),
            (CUT_CAPTION, counted.truncated),
            (UNKNOWN_WORDS, counted.unknown_share > limits.unknown_share),
            (LITTLE_MOTION, still is not None and row.motion is not None and row.motion < still),
            (FILTER_REFUSED, row.note.refused is not None),
            (TRIMMED, row.plan.status == "trimmed"),
        )
        marks = [mark for mark, holds in asked if holds]
        found.append(replace(row, marks=tuple(dict.fromkeys([*marks, *row.note.flags]))))
    return found


def _plain(row: ClipRow) -> str:
    """The caption as far as it can differ: case and spaces do not count."""
    return " ".join(row.plan.source.caption.casefold().split())
