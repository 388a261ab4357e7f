"""The sheet of a data set: one HTML file that needs nothing else, with every clip, its caption and what becomes of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from mochi_lora.files import write_text
from mochi_lora.report import wording
from mochi_lora.report.dataset_plots import dataset_panels
from mochi_lora.report.dataset_problems import MEANINGS, Problem, clips, problems
from mochi_lora.report.dataset_rows import ClipRow, LeftOut
from mochi_lora.report.templating import own_script, page_environment
from mochi_lora.spec import TEXT_TOKENS


@dataclass(frozen=True)
class PartTold:
    """One line about an entry of `data.mix`."""

    clips: str
    count: int
    samples: int  # per epoch


@dataclass(frozen=True)
class Sheet:
    """Everything the page says. `parts` is empty where `data.clips` is all there is."""

    title: str
    model: str
    rows: Sequence[ClipRow]
    left_out: Sequence[LeftOut]  # by encode
    left_out_before: Sequence[LeftOut]  # by prepare, on the way to the table
    parts: Sequence[PartTold] = ()
    validates: bool = True  # clips are to be held out
    least_motion: float | None = None  # filter.min_motion
    not_counted: str = ""  # why T5 tokens are not known
    most_strips: int = 0  # clips whose frames the page may carry


@dataclass(frozen=True)
class _Shape:
    """One bucket's line."""

    bucket: str
    clips: int
    trimmed: int
    used: float
    unused: float


def write_sheet(path: Path, sheet: Sheet) -> list[Problem]:
    """Write the page to `path`, atomically; what looks wrong is also returned."""
    found = problems(sheet.rows, sheet.left_out, validates=sheet.validates)
    write_text(path, _environment().get_template("dataset.html").render(**_words(sheet, found)))
    return found


def _words(sheet: Sheet, found: Sequence[Problem]) -> dict[str, object]:
    rows = sheet.rows
    return {
        "it": sheet,
        **own_script("dataset.js"),
        "problems": found,
        "headline": headline(rows),
        "shapes": _shapes(rows),
        "panels": dataset_panels(rows, sheet.least_motion),
        "marks": Counter(mark for row in rows for mark in row.marks).most_common(),
        "samples": sum(part.samples for part in sheet.parts),
        "shown": sum(bool(row.strip) for row in rows),
        "searched": [_searched(row) for row in rows],
    }


def headline(rows: Sequence[ClipRow]) -> str:
    """How much there is to train on, in a sentence."""
    if not rows:
        return "There is no clip to train on"
    pictures = sum(row.plan.seconds == 0 for row in rows)
    films = len(rows) - pictures
    kinds = [clips(films)] if films else []
    kinds += [f"{pictures:,} image{'' if pictures == 1 else 's'}"] if pictures else []
    seconds = sum(row.used_seconds for row in rows)
    film = f"{seconds:.1f} s of film" if films else "no film"
    return f"{' and '.join(kinds)} to train on: {film}"


def _shapes(rows: Sequence[ClipRow]) -> list[_Shape]:
    made = []
    for bucket in sorted({row.plan.bucket for row in rows}):
        mine = [row for row in rows if row.plan.bucket == bucket]
        unused = sum(row.plan.unused_seconds for row in mine)
        trimmed = sum(row.plan.status == "trimmed" for row in mine)
        made.append(_Shape(str(bucket), len(mine), trimmed, sum(row.used_seconds for row in mine), unused))
    return made


def _searched(row: ClipRow) -> str:
    """What the search field looks into."""
    return f"{row.plan.source.name} {row.plan.source.caption}".lower()


def _environment() -> Environment:
    environment = page_environment(ALARMING=MEANINGS, TEXT_TOKENS=TEXT_TOKENS, clips=clips)
    environment.filters.update({"number": wording.number, "percent": wording.percent})
    return environment
