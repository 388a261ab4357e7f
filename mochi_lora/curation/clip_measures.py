"""What the survey says of one range of a source: the numbers its filter looks at."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mochi_lora.curation.shots import Shot, black_frames
from mochi_lora.curation.survey import Survey

HASH_SECONDS = 0.125  # between a clip's picture hashes: by time, so that two clips can be shifted against each other
_SAME_TIME = 1e-6  # seconds


@dataclass(frozen=True)
class ClipMeasures:
    """One clip; None is not measured (no look falls into its shot)."""

    black: float  # share of black frames
    luma: float  # mean, 0 to 1
    motion: float | None  # fastest 5 % of the flow, mean over the clip, percent of the short side per 1/8 s
    sharpness: float | None  # variance of the Laplacian at 360 lines, median
    flicker: float  # brightness swing, mean, share of full range
    change: float  # mean absolute difference of successive frames, share of full range
    bars: tuple[int, int, int, int] | None  # crop that takes bars off: left, top, right, bottom in pixels as shown
    width: int  # pixels as shown, of the whole picture
    height: int
    hashes: tuple[str, ...]  # 64 bits each, hexadecimal

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ClipMeasures":
        """From a manifest's JSON. Raises TypeError or KeyError where it is none."""
        bars = row["bars"]
        crop = None if bars is None else (bars[0], bars[1], bars[2], bars[3])
        return cls(**{**row, "bars": crop, "hashes": tuple(row["hashes"])})

    def to_row(self) -> dict[str, Any]:
        """For a manifest's JSON, rounded to what can be told apart."""
        rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return {**rounded, "bars": None if self.bars is None else list(self.bars), "hashes": list(self.hashes)}


def measure_clip(survey: Survey, shot: Shot, start: float, end: float, black: float) -> ClipMeasures:
    """Measures of the seconds [start, end) of `shot`. Bars are told from the whole shot: a dark moment has none of its own."""
    first = max(shot.first, int(np.searchsorted(survey.times, start - _SAME_TIME)))
    stop = min(shot.stop, int(np.searchsorted(survey.times, end - _SAME_TIME)))
    assert first < stop, (start, end)
    frames = slice(first, stop)
    looks = _looks(survey, shot, first, stop)
    inner = survey.swing[first + 1 : stop - 1]  # its first and last value look across the clip's borders
    return ClipMeasures(
        black=float(black_frames(survey, black)[frames].mean()),
        luma=float(survey.luma[frames].mean()) / 255,
        motion=float(survey.motion[looks].mean()) if len(looks) else None,
        sharpness=float(np.median(survey.sharpness[looks])) if len(looks) else None,
        flicker=float(inner.mean()) / 255 if len(inner) else 0.0,
        change=float(survey.change[first + 1 : stop].mean()) / 255 if stop - first > 1 else 0.0,
        bars=survey.bars(shot.first, shot.stop),
        width=survey.width,
        height=survey.height,
        hashes=tuple(f"{int(value):016x}" for value in survey.hashes[_instants(survey, first, stop)]),
    )


def _instants(survey: Survey, first: int, stop: int) -> np.ndarray:
    """Frames of [first, stop) nearest to every `HASH_SECONDS` from its first."""
    times = survey.times[first:stop]
    wanted = np.arange(times[0], times[-1] + _SAME_TIME, HASH_SECONDS)
    after = np.searchsorted(times, wanted).clip(1 if len(times) > 1 else 0, len(times) - 1)
    before = (after - 1).clip(0)
    return first + np.where(wanted - times[before] < times[after] - wanted, before, after)


def _looks(survey: Survey, shot: Shot, first: int, stop: int) -> np.ndarray:
    """Looks inside the clip whose flow began inside it too, or the shot's nearest to its middle, or none."""
    apart = max(1, survey.around // 2)
    inside = np.flatnonzero((survey.looks >= first + apart) & (survey.looks < stop))
    if len(inside):
        return inside
    in_shot = np.flatnonzero((survey.looks >= shot.first + apart) & (survey.looks < shot.stop))
    if not len(in_shot):
        return in_shot
    middle = (first + stop) / 2
    return in_shot[[np.abs(survey.looks[in_shot] - middle).argmin()]]
