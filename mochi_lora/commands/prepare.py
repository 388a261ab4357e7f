"""`mochi-lora prepare`: raw footage to a table of clips. Survey, split, filter, caption; each can be stopped and run again."""

from pathlib import Path
from typing import Literal

from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table, progress_bar
from mochi_lora.curation.filters import Distribution, count_reasons, distribution_row, distributions, filter_clips
from mochi_lora.curation.footage import Progress, Refused, Surveyed, list_footage, survey_footage
from mochi_lora.curation.manifest import (
    DISTRIBUTIONS,
    FOOTAGE,
    KEPT,
    REFUSED,
    SPLIT,
    Clip,
    read_clips,
    with_texts_of,
    write_table,
)
from mochi_lora.curation.split import split_source
from mochi_lora.errors import ClipError, UserError
from mochi_lora.files import only_one, remove_abandoned, write_json

Step = Literal["split", "filter"]


def run(config: Config, *, only: Step | None = None) -> None:
    """All steps, or only one of them. What an earlier run has surveyed is not decoded again."""
    folder = config.prepare.folder
    with only_one(folder, "preparing footage"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        if only != "filter":
            _split(config, folder)
        if only != "split":
            _filter(config, folder)
    if only == "split":
        _say_next("data_prep/filter_clips.py --config <the same file>   (or mochi-lora prepare, for all that is left)")
    elif only == "filter":
        _say_next("mochi-lora caption --config <the same file>")
    else:
        from mochi_lora.commands import caption  # noqa: PLC0415 - splitting and filtering need no torch

        caption.run(config)
        _say_next(f"mochi-lora encode --config <the same file> --data.clips {folder / KEPT}")


def _split(config: Config, folder: Path) -> None:
    paths = list_footage(config.prepare.footage, folder)
    with progress_bar() as bar:
        task = bar.add_task("frames surveyed", total=None)
        progress = Progress(
            lambda frames: bar.update(task, total=frames, refresh=True), lambda frames: bar.update(task, advance=frames)
        )
        found = survey_footage(paths, folder, config.split, config.prepare.workers, progress)
    clips: list[Clip] = []
    rows: list[dict[str, object]] = []
    for path, outcome in zip(paths, found, strict=True):
        made, row = _clips_of(config, path, outcome, folder)
        clips += made
        rows.append({"source": str(path), **row})
    write_table(folder / SPLIT, (clip.to_row() for clip in clips))
    write_table(folder / FOOTAGE, rows)
    refused = [row for row in rows if "refused" in row]
    surveyed = [outcome for outcome in found if isinstance(outcome, Surveyed)]
    seconds = sum(outcome.survey.duration for outcome in surveyed)
    used = sum(clip.end - clip.start for clip in clips)
    again = sum(outcome.was_there for outcome in surveyed)
    print_table(
        "footage",
        ("", "count", ""),
        [
            ("videos", len(rows) - len(refused), f"{seconds:.1f} s, {again} of them surveyed by an earlier run"),
            ("shots", sum(int(str(row.get("shots", 0))) for row in rows), ""),
            ("clips", len(clips), f"{used:.1f} s, {config.split.mode}, {config.split.frames} frames each"),
            ("videos refused", len(refused), ""),
        ],
    )
    if refused:
        print_table("refused", ("video", "reason"), [(row["source"], row["refused"]) for row in refused])
    console.print(f"clips    {folder / SPLIT}", markup=False)
    if not clips:
        message = (
            f"{config.prepare.footage}: no clip of {config.split.frames} frames in it; {folder / FOOTAGE} says what each video "
            "gave. Shorter clips: split.frames; less left out at cuts: split.margin"
        )
        raise UserError(message)


def _clips_of(config: Config, path: Path, outcome: Surveyed | Refused, folder: Path) -> tuple[list[Clip], dict[str, object]]:
    """(clips, the columns of footage.jsonl that say what became of the source)."""
    if isinstance(outcome, Refused):
        return [], {"refused": outcome.reason}
    try:
        clips, shots = split_source(path, outcome.survey, config.split, folder)
    except ClipError as error:
        return [], {"refused": str(error).removeprefix(f"{path}: ")}
    used = sum(clip.end - clip.start for clip in clips)
    return clips, {
        "seconds": round(outcome.survey.duration, 3),
        "shots": shots,
        "clips": len(clips),
        "seconds_in_clips": round(used, 3),
    }


def _filter(config: Config, folder: Path) -> None:
    clips = read_clips(folder / SPLIT, "mochi-lora prepare")
    judged = filter_clips(clips, config.filter)
    kept = with_texts_of([clip for clip in judged if clip.refused is None], folder / KEPT)
    refused = [clip for clip in judged if clip.refused is not None]
    seen = distributions(clips, config.filter)
    write_json(folder / DISTRIBUTIONS, [distribution_row(one) for one in seen])
    write_table(folder / REFUSED, (clip.to_row() for clip in refused))
    write_table(folder / KEPT, (clip.to_row() for clip in kept))
    bars = sum("letterbox" in clip.flags for clip in kept)
    told = "their crop is in the table" if config.filter.crop_bars else "kept whole: filter.crop_bars is false"
    rows: list[tuple[str, int, str]] = [("kept", len(kept), f"{sum(clip.end - clip.start for clip in kept):.1f} s")]
    rows += [("of these with bars", bars, told)] if bars else []
    rows += [(f"refused: {reason}", count, "") for reason, count in count_reasons(judged)]
    print_table("clips", ("", "count", ""), rows)
    _print_distributions(seen)
    for name, path in (("kept", KEPT), ("refused", REFUSED), ("limits", DISTRIBUTIONS)):
        console.print(f"{name:<8} {folder / path}", markup=False)
    if not kept:
        message = f"{folder / SPLIT}: no clip passes the limits; the table above shows what each was cut from: change filter.*"
        raise UserError(message)


def _print_distributions(seen: list[Distribution]) -> None:
    header = ("filter.", "limit", "refuses", "least", "5 %", "median", "95 %", "most", "from least to most; | is the limit")
    parts = ("0", "5", "50", "95", "100")
    rows = [
        (
            one.setting,
            "off" if one.threshold is None else f"{one.threshold:g}",
            f"{one.refused} of {one.clips}",
            *(f"{one.percentiles[part]:.3g}" for part in parts),
            one.picture,
        )
        for one in seen
    ]
    print_table("what the limits are cut from", header, rows)


def _say_next(command: str) -> None:
    console.print(f"next     {command}", markup=False)
