"""`mochi-lora export`: the data set as a folder that can be shared: clips as files of their own, a table, a card.

    <folder>/clips/<name>_<key>.mp4   `data.export`: copied, or cut without loss
    <folder>/metadata.jsonl           file_name, text, start, source: what `datasets` and the hub call a video folder
    <folder>/README.md                the card, a stub; one that is there is kept

`data.clips: <folder>` reads it back: the same frames, hence the same latents.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table, progress_bar
from mochi_lora.data.ahead import begun_ahead, threads_to_read
from mochi_lora.data.export import export_clip
from mochi_lora.data.known_files import KnownFiles
from mochi_lora.data.media import IMAGE_SUFFIXES
from mochi_lora.data.mix import Part, list_part, parts_of, where_of
from mochi_lora.data.sources import ClipSource, Rejection, is_sha256
from mochi_lora.errors import ClipError, UserError
from mochi_lora.files import only_one, remove_abandoned, write_text

_CLIPS, _TABLE, _CARD = "clips", "metadata.jsonl", "README.md"
_OURS = {_CLIPS, _TABLE, _CARD, ".gitattributes", ".git", ".cache"}
_CARD_TEXT = """\
---
license: unknown
task_categories:
- text-to-video
tags:
- mochi-lora
---

# {name}

{clips} captioned clips, {videos} videos and {images} images, exported by mochi-lora. To be filled in: what they show,
where they come from, who made them, under which licence they may be shared.

`metadata.jsonl` has a line per clip:

- `file_name`: the clip. Clips that were ranges of longer videos are H.264 in lossless RGB (4:4:4), which browsers do not
  play; `ffmpeg -i CLIP -pix_fmt yuv420p OUT.mp4` makes one that they do.
- `text`: the caption.
- `start`: seconds into the file at which the clip begins, where it begins between two frames; else null.
- `source`: SHA-256 of the video that the clip was cut from. Clips of one video belong on one side of any split.

Train on it with `data.clips: <this folder>`, or load it with `datasets.load_dataset("videofolder", data_dir=<this folder>)`.
"""


@dataclass(frozen=True)
class _Row:
    """One line of the table."""

    file: Path
    text: str
    start: float | None
    source: str


def run(config: Config, folder: Path) -> None:
    """Export everything the configuration names. Run again to continue; files that are there are kept."""
    _refuse_foreign(folder)
    with only_one(folder, "exporting"):
        (folder / _CLIPS).mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        rows: list[_Row] = []
        rejections: list[Rejection] = []
        with progress_bar() as bar:
            task = bar.add_task("exporting", total=None)
            for part in parts_of(config.data):
                sources, unlisted = list_part(part, config.data)
                rejections += unlisted
                bar.update(task, total=len(rows) + len(rejections) + len(sources), completed=len(rows) + len(rejections))
                for outcome in _outcomes(sources, part, threads_to_read(config.encode.read_ahead), folder / _CLIPS):
                    if isinstance(outcome, _Row):
                        rows.append(outcome)
                    else:
                        rejections.append(outcome)
                    bar.update(task, advance=1)
        if rows:
            _write_table(folder, list(dict.fromkeys(rows)))
    if rejections:
        print_table("left out", ("clip", "reason"), [(item.name, item.reason) for item in rejections])
    if not rows:
        raise UserError(f"{where_of(config.data)}: no clip could be exported; the table above says why for each")
    _farewell(folder, rows, rejections)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder to export into")
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    ours = {name for name in names if name.partition(".tmp-")[0] in _OURS}  # what a kill left half written, too
    foreign = sorted(names - ours)
    if foreign:
        raise UserError(f"{folder}: holds {foreign[0]}, which is not of an export; name a new folder")


def _outcomes(sources: Sequence[ClipSource], part: Part, ahead: int, clips: Path) -> list[_Row | Rejection]:
    outcomes: list[_Row | Rejection] = []
    work = partial(_export, part=part, files=KnownFiles(), clips=clips)
    with closing(begun_ahead(work, sources, ahead)) as ready:
        for source, wait in zip(sources, ready, strict=True):
            try:
                outcomes.append(wait())
            except ClipError as error:
                outcomes.append(Rejection.of(source, error))
    return outcomes


def _export(source: ClipSource, *, part: Part, files: KnownFiles, clips: Path) -> _Row:
    file = files(source.path)
    done = export_clip(source, file.info, file.sha256, part.shapes, clips)
    return _Row(done.path, source.caption.strip(), done.start, _video(source, file.sha256))


def _video(source: ClipSource, sha256: str) -> str:
    """What the clip was cut from, as a digest: a path of ours is nobody else's business."""
    if source.video is None:
        return sha256
    return source.video if is_sha256(source.video) else hashlib.sha256(source.video.encode()).hexdigest()


def _write_table(folder: Path, rows: Sequence[_Row]) -> None:
    lines = [
        {"file_name": row.file.relative_to(folder).as_posix(), "text": row.text, "start": row.start, "source": row.source}
        for row in rows
    ]
    write_text(folder / _TABLE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if not (folder / _CARD).exists():
        images = sum(row.file.suffix in IMAGE_SUFFIXES for row in rows)
        told = {"name": folder.resolve().name, "clips": len(rows), "videos": len(rows) - images, "images": images}
        write_text(folder / _CARD, _CARD_TEXT.format(**told))


def _farewell(folder: Path, rows: Sequence[_Row], rejections: Sequence[Rejection]) -> None:
    named = {row.file for row in rows}
    size = sum(path.stat().st_size for path in named) / 2**20
    console.print(f"export   {folder}: {len(rows)} clips, {size:,.0f} MiB, {len(rejections)} left out", markup=False)
    stale = sorted(path.name for path in (folder / _CLIPS).iterdir() if path not in named)
    if stale:
        console.print(f"{folder / _CLIPS}: {len(stale)} files of an earlier export, such as {stale[0]}, are not in the table")
    twice = [text for text, count in Counter(row.file for row in rows).items() if count > 1]
    if twice:
        console.print(
            f"{len(twice)} clips have more than one caption, which `datasets` does not read: {twice[0]}", markup=False
        )
    console.print(f"next     write {folder / _CARD}; train on it with --data.clips {folder}", markup=False)
