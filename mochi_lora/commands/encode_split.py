"""What `encode` and its plan say of the clips that are held out for the validation loss."""

from collections.abc import Sequence

from mochi_lora.console import console
from mochi_lora.data.media import VIDEO_SUFFIXES
from mochi_lora.data.sources import ClipSource
from mochi_lora.data.split import clips_to_hold_out, validation_sources, video_of

_NEAR = 0.5  # of the clips asked for: a split that is off by more is told aloud


def tell_split(videos: Sequence[str], fraction: float, *, about: str = "") -> None:
    """How many clips of how many videos are held out, `videos` naming each clip's; aloud where the fraction is not met.

    `about` is put before the count where the split itself may come out otherwise.
    """
    if fraction == 0 or len(videos) < 2:
        return
    held_out = validation_sources(videos, fraction)
    if not held_out:
        console.print("split    all clips come from one video: none is held out for the validation loss", style="yellow")
        return
    clips = sum(video in held_out for video in videos)
    told = f"{about}{_count(clips, 'clip')} of {_count(len(held_out), 'video')} held out for the validation loss"
    rest = f"{_count(len(videos) - clips, 'clip')} of {_count(len(set(videos)) - len(held_out), 'video')} to train on"
    console.print(f"split    {told}, {rest}", markup=False)
    wanted = clips_to_hold_out(len(videos), fraction)
    if abs(clips - wanted) > _NEAR * wanted:
        told = f"data.validation_fraction {fraction:g} asks for {_count(wanted, 'clip')}, and videos are held out whole"
        advice = "clips of more videos come nearer; 0 trains on all"
        console.print(f"{told}: it is {clips / len(videos):.0%} of the clips; {advice}", style="yellow", markup=False)


def tell_unnamed_sources(sources: Sequence[ClipSource], fraction: float) -> None:
    """Say that files which may have been cut from one film are split as if they were not, where nothing tells."""
    cut = [
        source
        for source in sources
        if source.path.suffix.lower() in VIDEO_SUFFIXES and not (source.start or source.end or source.video)
    ]
    if fraction == 0 or len(cut) < 2:
        return
    console.print(
        f"{len(cut):,} clips are whole files, and none names its source: each counts as a video of its own, and files cut from "
        "one shot may be on both sides of the split. A table (data.clips) keeps them together: give those of one film the "
        "same `source`, the film's file name or SHA-256",
        style="yellow",
        markup=False,
    )


def tell_planned_split(sources: Sequence[ClipSource], fraction: float) -> None:
    """`tell_split` before any file was read for its SHA-256: by paths, so which videos are taken, and how many, may differ."""
    paths = [str(source.path.resolve()) for source in sources]
    videos = video_of((path, source.video) for path, source in zip(paths, sources, strict=True))
    tell_split([videos[path] for path in paths], fraction, about="about ")
    tell_unnamed_sources(sources, fraction)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
