"""Clips of a legal length out of one shot, as ranges of time. Pure: times in, (start, end) out.

A range begins at a source frame and holds footage for exactly the frames asked for at Mochi's 30 per second, by the same rule
as `data.geometry.nearest_frames`: the last instant lies at most half a frame's time after the last source frame.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mochi_lora.config.curation import SplitConfig
from mochi_lora.spec import FRAMES_PER_SECOND, illegal_frames

Mode = Literal["head", "middle", "chunk", "slide", "uniform"]
_SAME_TIME = 1e-6  # seconds, as in data.geometry
_DIGITS = 6  # decimals of a second: half of the last one is below _SAME_TIME


@dataclass(frozen=True)
class ClipRange:
    """Seconds [start, end) of a source."""

    start: float
    end: float


@dataclass(frozen=True)
class Usable:
    """The part of a shot clips are taken from: `times` of its frames (ascending, seconds), and where it ends."""

    times: Sequence[float]
    end: float
    frame_seconds: float


def usable_part(times: Sequence[float], end: float, frame_seconds: float, margin: float) -> Usable:
    """A shot whose frames have `times` and which ends at `end`, less `margin` seconds on both sides.

    Encoders and editors smear a frame or two across a cut, and a fade's first step is too faint to be found.
    """
    assert margin >= 0, margin
    if not times:
        return Usable((), end, frame_seconds)
    first = bisect_left(times, times[0] + margin - _SAME_TIME)
    end -= margin
    stop = bisect_left(times, end - _SAME_TIME)
    return Usable(times[first:stop], end, frame_seconds)


def clip_ranges(part: Usable, split: SplitConfig) -> list[ClipRange]:
    """Ranges in order of time, each for `split.frames` frames; empty where the part is too short for one.

    head: the beginning. middle: around the middle. chunk: one after the other without overlap. slide: one every
    `split.stride` frames. uniform: `split.count`, evenly spread from the first that fits to the last; none twice.
    """
    assert illegal_frames(split.frames) is None, split.frames
    length = split.frames / FRAMES_PER_SECOND
    last = _last_start(part, split.frames)
    if last is None:
        return []
    first_time, last_time = part.times[0], part.times[last]
    match split.mode:
        case "head":
            wanted = [first_time]
        case "middle":
            wanted = [first_time + (last_time - first_time) / 2]
        case "uniform":
            gaps = max(1, split.count - 1)
            even = [first_time + (last_time - first_time) * place / gaps for place in range(split.count)]
            wanted = [first_time + (last_time - first_time) / 2] if split.count == 1 else even
        case "slide":
            wanted = list(_steps(first_time, last_time, split.stride / FRAMES_PER_SECOND))
        case "chunk":
            return list(_chunks(part, split.frames, length))
    starts = sorted({_nearest(part.times, time, last) for time in wanted})
    found = (_range_from(part, start, split.frames) for start in starts)
    return [clip for clip in found if clip is not None]


def _chunks(part: Usable, frames: int, length: float) -> Iterator[ClipRange]:
    index = 0
    while index < len(part.times):
        clip = _range_from(part, index, frames)
        if clip is None:
            index += 1
            continue
        yield clip
        index = bisect_left(part.times, max(clip.end, part.times[index] + length) - _SAME_TIME)


def _steps(first: float, last: float, step: float) -> Iterator[float]:
    place = 0
    while (time := first + place * step) <= last + _SAME_TIME:
        yield time
        place += 1


def _range_from(part: Usable, index: int, frames: int) -> ClipRange | None:
    """The range that begins at frame `index` of `part`; None where its footage does not reach."""
    start = part.times[index]
    last_instant = start + (frames - 1) / FRAMES_PER_SECOND
    end = min(start + frames / FRAMES_PER_SECOND, part.end)
    stop = bisect_left(part.times, end - _SAME_TIME, index)
    # Footage slower than 30 per second may have its frame for the last instant only after `end`.
    while part.times[stop - 1] + part.frame_seconds / 2 < last_instant - _SAME_TIME:
        if stop == len(part.times):
            return None
        stop += 1
        after = part.times[stop] if stop < len(part.times) else part.end
        end = part.times[stop - 1] + (after - part.times[stop - 1]) / 2
    return ClipRange(round(start, _DIGITS), round(end, _DIGITS))


def _last_start(part: Usable, frames: int) -> int | None:
    """Index of the last frame a range can begin at; None where there is none."""
    if not part.times:
        return None
    latest = part.times[-1] + part.frame_seconds / 2 - (frames - 1) / FRAMES_PER_SECOND
    index = bisect_right(part.times, latest + _SAME_TIME) - 1
    return next((place for place in range(index, -1, -1) if _range_from(part, place, frames) is not None), None)


def _nearest(times: Sequence[float], instant: float, last: int) -> int:
    later = min(bisect_left(times, instant, 0, last + 1), last)
    earlier = max(0, later - 1)
    return earlier if instant - times[earlier] < times[later] - instant else later
