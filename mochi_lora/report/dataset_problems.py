"""What looks wrong about a data set, in plain words. Nothing here refuses anything; `encode` does that."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mochi_lora.report import dataset_rows as marks
from mochi_lora.report.dataset_rows import ClipRow, LeftOut
from mochi_lora.report.wording import percent
from mochi_lora.spec import TEXT_TOKENS

_DOMINATES = 0.5  # of the clips
_FEW = 4  # clips below which a share says nothing
_MOSTLY_LEFT_OUT = 0.5

MEANINGS = {
    marks.NO_TRIGGER: "{clips} without the trigger: the word will not call what is seen there",
    marks.SAME_CAPTION: "{clips} with the caption of another clip: the same is said of different pictures",
    marks.CUT_CAPTION: f"{{clips}} with a caption of more than {TEXT_TOKENS} T5 tokens: the rest is never read",
    marks.UNKNOWN_WORDS: "{clips} with many words that T5 does not know (it knows English)",
    marks.LITTLE_MOTION: "{clips} with little motion: there is nothing to learn about how things move",
    marks.UNREADABLE: "{clips} whose frames cannot be read: encode will leave them out",
    marks.FILTER_REFUSED: "{clips} that the filter refused and the table still holds: encode takes what the table holds",
}


@dataclass(frozen=True)
class Problem:
    """One sentence; `mark` picks the clips it is about, "" where it is about all."""

    text: str
    mark: str = ""


def problems(rows: Sequence[ClipRow], left_out: Sequence[LeftOut], *, validates: bool) -> list[Problem]:
    """What a person should look at before spending GPU time, clips first; `validates`: clips are to be held out."""
    counts = Counter(mark for row in rows for mark in row.marks)
    found = [Problem(text.format(clips=clips(counts[mark])), mark) for mark, text in MEANINGS.items() if counts[mark]]
    return [*found, *_films(rows, validates=validates), *_losses(rows, left_out)]


def standing_out(row: ClipRow) -> bool:
    """Whether one of these sentences is about this clip."""
    return any(mark in MEANINGS for mark in row.marks)


def clips(count: int) -> str:
    """`1 clip`, `2 clips`."""
    return f"{count:,} clip{'' if count == 1 else 's'}"


def _films(rows: Sequence[ClipRow], *, validates: bool) -> list[Problem]:
    films = Counter(row.film for row in rows)
    if len(rows) < _FEW:
        return []
    name, most = films.most_common(1)[0]
    if len(films) == 1 and validates:
        return [Problem(f"All clips are from one video ({name}): none can be held out to see if training generalises")]
    if len(films) > 1 and most > _DOMINATES * len(rows):
        share = percent(most / len(rows))
        return [Problem(f"{share} of the clips are from one video ({name}): the adapter will learn that video")]
    return []


def _losses(rows: Sequence[ClipRow], left_out: Sequence[LeftOut]) -> list[Problem]:
    if len(left_out) <= _MOSTLY_LEFT_OUT * (len(rows) + len(left_out)):
        return []
    return [Problem(f"More is left out ({len(left_out):,}) than used ({len(rows):,}): see the reasons at the end")]
