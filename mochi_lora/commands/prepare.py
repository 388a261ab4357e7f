"""`mochi-lora prepare`: raw footage to a table of clips. Survey, split, filter, caption; each can be stopped and run again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mochi_lora.commands.prepare_tables import Source, print_distributions, print_footage
from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table, progress_bar
from mochi_lora.curation.by_hand import Decision, count_out, read_decisions, with_decisions, write_decisions, write_kept
from mochi_lora.curation.caption_sheet import SHEET
from mochi_lora.curation.filters import count_reasons, distribution_row, filter_clips
from mochi_lora.curation.footage import Progress, Refused, Surveyed, list_footage, survey_footage
from mochi_lora.curation.manifest import (
    BY_HAND,
    DISTRIBUTIONS,
    FOOTAGE,
    KEPT,
    REFUSED,
    SPLIT,
    TEXTS,
    Clip,
    Key,
    read_clips,
    read_texts,
    with_texts,
    without_clip,
    write_table,
    write_texts,
)
from mochi_lora.curation.split import split_source
from mochi_lora.errors import ClipError, UserError
from mochi_lora.files import only_one, remove_abandoned, write_json
from mochi_lora.runs.called import Called
from mochi_lora.spec import Bucket

Step = Literal["split", "filter"]
_ADD_TO_MIX = "add {{clips: {}}} to data.mix"


def run(config: Config, *, only: Step | None = None, encode: bool = False, called: Called = Called()) -> None:  # noqa: B008
    """All steps, or only one of them. What an earlier run has surveyed is not decoded again.

    With `encode` the clips become cached samples as well, if each of them has a caption.
    """
    folder = config.prepare.folder
    _require_a_bucket(config)
    to_encode = _naming_the_table(config)
    if encode and to_encode is None:
        raise UserError(f"--encode: data.mix has no entry for {folder / KEPT}; {_ADD_TO_MIX.format(folder / KEPT)}")
    with only_one(folder, "preparing footage"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        if only != "filter":
            _split(config, folder)
        if only != "split":
            _filter(config, folder)
    if only == "split":
        called.say_next("prepare --only filter", "(or without --only, for all that is left)")
    elif only == "filter":
        called.say_next("caption")
    else:
        _caption(config, to_encode, encode=encode, called=called)


def _caption(config: Config, to_encode: list[str] | None, *, encode: bool, called: Called) -> None:
    from mochi_lora.commands import caption  # noqa: PLC0415 - splitting and filtering need no torch

    table = config.prepare.folder / KEPT
    missing = caption.run(config, clips=table)
    if to_encode is None:
        console.print(f"next     {_ADD_TO_MIX.format(table)}; then mochi-lora encode", markup=False)
        return
    if missing and config.caption.model is None and not encode:
        called.say_next("caption", f"(once {config.prepare.folder / SHEET} has their captions)")
        return
    called = called.also(to_encode)
    if not encode:
        called.say_next("encode")
        return
    if missing:
        raise UserError(
            f"--encode: {missing} clips of {table} have no caption; look at them and write one into the column text, then run "
            "this again, or mochi-lora encode, which leaves them out"
        )
    from mochi_lora.commands import encode as encoding  # noqa: PLC0415

    clips = {} if config.data.mix else {"clips": table}
    data = config.data.model_copy(update=clips)
    encoding.run(config.model_copy(update={"data": data}), called=called)


def _naming_the_table(config: Config) -> list[str] | None:
    """The overrides with which `encode` takes what is written here; None where data.mix lacks it, which no override adds."""
    table = config.prepare.folder / KEPT
    if config.data.mix:
        return [] if any(part.clips == table for part in config.data.mix) else None
    return [] if config.data.clips == table else ["--data.clips", str(table)]


def _require_a_bucket(config: Config) -> None:
    """Raises UserError where every clip would be too short for `encode`: that is known before anything is decoded."""
    owners = [part for part in config.data.mix if part.clips == config.prepare.folder / KEPT]
    buckets = (owners[0].buckets if owners else None) or config.data.buckets
    least = min(Bucket.parse(bucket).frames for bucket in buckets)
    if config.split.frames < least:
        raise UserError(
            f"split.frames: clips of {config.split.frames} frames are shorter than every bucket ({', '.join(buckets)}), and "
            f"encode would refuse them all; set split.frames to {least} or more, or add a shorter bucket to data.buckets"
        )


def _split(config: Config, folder: Path) -> None:
    paths, passed_over = list_footage(config.prepare.footage, folder)
    with progress_bar() as bar:
        task = bar.add_task("frames surveyed", total=None)
        progress = Progress(
            lambda frames: bar.update(task, total=frames, refresh=True), lambda frames: bar.update(task, advance=frames)
        )
        found = survey_footage(paths, folder, config.split, config.prepare.workers, progress)
    clips: list[Clip] = []
    sources: list[Source] = []
    for path, outcome in zip(paths, found, strict=True):
        made, source = _clips_of(config, path, outcome, folder)
        clips += made
        sources.append(source)
    write_table(folder / SPLIT, (clip.to_row() for clip in clips))
    write_table(folder / FOOTAGE, (source.to_row() for source in sources))
    again = sum(outcome.was_there for outcome in found if isinstance(outcome, Surveyed))
    print_footage(sources, config.split, again, passed_over)
    console.print(f"clips    {folder / SPLIT}", markup=False)
    if not clips:
        message = (
            f"{config.prepare.footage}: no clip of {config.split.frames} frames in it; {folder / FOOTAGE} says what each video "
            "gave. Shorter clips: split.frames; less left out at cuts: split.margin"
        )
        raise UserError(message)


def _clips_of(config: Config, path: Path, outcome: Surveyed | Refused, folder: Path) -> tuple[list[Clip], Source]:
    if isinstance(outcome, Refused):
        return [], Source(path, refused=outcome.reason)
    try:
        clips, became = split_source(path, outcome.survey, config.split, folder)
    except ClipError as error:
        return [], Source(path, refused=str(error).removeprefix(f"{path}: "))
    return clips, Source(path, None if clips else became.why_no_clip(config.split.frames), became, len(clips))


def _filter(config: Config, folder: Path) -> None:
    clips = read_clips(folder / SPLIT, "mochi-lora prepare")
    texts, decisions = read_texts(folder), read_decisions(folder)
    filtered = filter_clips(with_texts(clips, texts), config.filter)
    judged, seen = with_decisions(filtered.clips, decisions), filtered.distributions
    kept = [clip for clip in judged if clip.refused is None]
    write_texts(folder, texts)
    write_decisions(folder, decisions)
    write_json(folder / DISTRIBUTIONS, [distribution_row(one) for one in seen])
    write_table(folder / REFUSED, (clip.to_row() for clip in judged if clip.refused is not None))
    write_kept(folder, kept)
    bars = sum("letterbox" in clip.flags for clip in kept)
    told = "their crop is in the table" if config.filter.crop_bars else "kept whole: filter.crop_bars is false"
    rows: list[tuple[str, int, str]] = [("kept", len(kept), f"{sum(clip.end - clip.start for clip in kept):.1f} s")]
    rows += [("of these with bars", bars, told)] if bars else []
    rows += [(f"refused: {reason}", count, "") for reason, count in count_reasons(judged)]
    print_table("clips", ("", "count", ""), rows)
    print_distributions(seen)
    for name, path in (("kept", KEPT), ("refused", REFUSED), ("limits", DISTRIBUTIONS)):
        console.print(f"{name:<8} {folder / path}", markup=False)
    _tell_decisions(folder, judged, decisions)
    if lost := without_clip(texts, judged):
        console.print(
            f"captions of {len(lost)} clips that are no more (split anew, or their video is gone): {folder / TEXTS} has them, "
            "they come back with their clips",
            style="yellow",
            markup=False,
        )
    if not kept:
        message = f"{folder / SPLIT}: no clip passes the limits; the table above shows what each was cut from: change filter.*"
        raise UserError(message)


def _tell_decisions(folder: Path, clips: Sequence[Clip], decisions: Mapping[Key, Decision]) -> None:
    """What is out because a person wants it so, and how it comes back."""
    out = count_out(clips, decisions)
    if out:
        console.print(
            f"by hand  {'1 clip is' if out == 1 else f'{out} clips are'} out, {folder / BY_HAND} has them: delete a line there "
            "and run mochi-lora prepare --only filter, and its clip is back",
            markup=False,
        )
