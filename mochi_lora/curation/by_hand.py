"""What people decide about clips in clips.jsonl: a deleted line, a `refused` or a `crop` of their own. Kept by every later run.

A deleted line leaves nothing to see it by: written.jsonl says what the filter wrote last, and what is missing since is out.
by_hand.jsonl remembers; a line deleted there, or a clip's line put back into clips.jsonl, undoes the decision.

No kill makes a decision or loses one: decisions are on disk first; then written.jsonl goes, so that nothing can seem deleted
while clips.jsonl is being replaced; then come clips.jsonl and its written.jsonl.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mochi_lora.curation.manifest import BY_HAND, KEPT, SPLIT, WRITTEN, Clip, Key, keyed_rows, write_table
from mochi_lora.errors import DamagedFileError, UserError

_BY_HAND = "by hand"
_DELETED = f"its line in {KEPT} was deleted"

Crop = tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Decision:
    """About one clip. `cropped` tells a crop of None, which is the whole picture, from no decision."""

    refused: str | None = None
    cropped: bool = False
    crop: Crop = None


def read_decisions(folder: Path) -> dict[Key, Decision]:
    """Those remembered, and those that clips.jsonl shows to have been made since the filter wrote it.

    Raises DamagedFileError naming a line that cannot be read, UserError naming one that is of no clip of ours.
    """
    remembered = keyed_rows(folder / BY_HAND)
    known = {key: _remembered(row, folder / BY_HAND, number) for key, (number, row) in remembered.items()}
    if not (folder / KEPT).is_file():
        return known  # deleted whole, to have it made anew
    there = keyed_rows(folder / KEPT)
    was_written = (folder / WRITTEN).is_file()  # not by earlier versions, and not between two steps of a killed run
    written = keyed_rows(folder / WRITTEN)
    for key, (number, row) in there.items():
        if was_written and key not in written and key not in known:
            raise UserError(
                f"{folder / KEPT}:{number}: {key[0]} from {key[1]:g} to {key[2]:g} s is no clip that the filter wrote; start "
                f"and end are those of {SPLIT}. Undo the change, or put the line into a table of your own (data.mix takes both)"
            )
        before = _crop(written[key][1], folder / WRITTEN, written[key][0]) if key in written else _automatic(row)
        known[key] = _decided(row, folder / KEPT, number, before, known.get(key, Decision()))
    gone = written.keys() - there.keys()
    known |= {key: replace(known.get(key, Decision()), refused=_DELETED) for key in gone}
    return {key: decision for key, decision in known.items() if decision != Decision()}


def _decided(row: Mapping[str, Any], table: Path, number: int, before: Crop, known: Decision) -> Decision:
    crop = _crop(row, table, number)
    refused = str(row["refused"]) if row.get("refused") else None
    return replace(known, refused=refused) if crop == before else Decision(refused, cropped=True, crop=crop)


def _automatic(row: Mapping[str, Any]) -> Crop:
    """The crop of `row`, if the filter may have set it."""
    bars, crop = (row.get("measures") or {}).get("bars"), row.get("crop")
    return None if crop in (None, []) or crop != bars else (crop[0], crop[1], crop[2], crop[3])


def _remembered(row: Mapping[str, Any], table: Path, number: int) -> Decision:
    refused = str(row["refused"]) if row.get("refused") else None
    return Decision(refused, cropped="crop" in row, crop=_crop(row, table, number))


def _crop(row: Mapping[str, Any], table: Path, number: int) -> Crop:
    cell = row.get("crop")
    if cell in (None, []):
        return None
    if not isinstance(cell, list) or len(cell) != 4 or not all(type(edge) is int for edge in cell):
        message = f"{table}:{number}: crop {cell!r}: expected [left, top, right, bottom] in whole pixels, or null; mend it"
        raise DamagedFileError(message)
    return cell[0], cell[1], cell[2], cell[3]


def write_decisions(folder: Path, decisions: Mapping[Key, Decision]) -> None:
    """Before any other table; see the top of this room."""
    rows = [
        {"file_name": name, "start": start, "end": end, "refused": decision.refused}
        | ({"crop": decision.crop} if decision.cropped else {})
        for (name, start, end), decision in sorted(decisions.items(), key=lambda item: item[0])
    ]
    if rows or (folder / BY_HAND).is_file():
        write_table(folder / BY_HAND, rows)


def write_kept(folder: Path, kept: Sequence[Clip]) -> None:
    """clips.jsonl, and what it is compared with from now on. `write_decisions` comes first."""
    (folder / WRITTEN).unlink(missing_ok=True)
    rows = [clip.to_row() for clip in kept]
    write_table(folder / KEPT, rows)
    write_table(folder / WRITTEN, ({name: row[name] for name in ("file_name", "start", "end", "crop")} for row in rows))


def with_decisions(clips: Sequence[Clip], decisions: Mapping[Key, Decision]) -> list[Clip]:
    """Filtered `clips` as people want them.

    After the filter: what is a duplicate of a clip that people put out does not come in its place.
    """
    return [_as_decided(clip, decisions.get(clip.key, Decision())) for clip in clips]


def _as_decided(clip: Clip, decision: Decision) -> Clip:
    refused = clip.refused if decision.refused is None else f"{_BY_HAND}: {decision.refused}"
    return replace(clip, refused=refused, crop=decision.crop if decision.cropped else clip.crop)


def count_out(clips: Sequence[Clip], decisions: Mapping[Key, Decision]) -> int:
    """How many of `clips` people put out."""
    return sum(decisions.get(clip.key, Decision()).refused is not None for clip in clips)
