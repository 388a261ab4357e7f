"""Which clips stay, why each of the others does not, and what every limit was cut from."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mochi_lora.config.curation import FilterConfig
from mochi_lora.curation.clip_measures import ClipMeasures
from mochi_lora.curation.duplicates import compare_clips
from mochi_lora.curation.manifest import Clip

_BINS = 20
_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Limit:
    """One threshold: what it looks at, on which side it refuses, and how the refusal is worded."""

    setting: str
    reason: str  # a word or two, for the table
    value: Callable[[ClipMeasures], float | None]
    threshold: float | None
    largest: bool  # whether it is the most a clip may have, or the least

    def refuses(self, measures: ClipMeasures) -> str | None:
        """Why, with value, threshold and setting; None where the clip passes, or the limit is off, or nothing was measured."""
        value = self.value(measures)
        if value is None or self.threshold is None:
            return None
        if value <= self.threshold if self.largest else value >= self.threshold:
            return None
        side = "above" if self.largest else "below"
        return f"{self.reason}: {value:.4g} is {side} filter.{self.setting} {self.threshold:g}"


@dataclass(frozen=True)
class Distribution:
    """The values a limit was cut from, over all clips, refused ones too; for duplicates over those that the others let pass."""

    setting: str
    threshold: float | None
    refused: int
    clips: int
    percentiles: dict[str, float]
    edges: tuple[float, ...]  # of the histogram's bins
    counts: tuple[int, ...]

    @property
    def picture(self) -> str:
        """The histogram in one line, `|` where the limit cuts."""
        most = max(self.counts, default=0)
        columns = [_BARS[-(-count * (len(_BARS) - 1) // most)] if most else " " for count in self.counts]
        if self.threshold is not None and self.counts:
            columns.insert(int(np.searchsorted(self.edges[1:], self.threshold)), "|")
        return "".join(columns)


def limits(settings: FilterConfig) -> tuple[Limit, ...]:
    """In the order in which they are asked; a clip's reason is the first that refuses it."""
    return (
        Limit("max_black", "black", lambda clip: clip.black, settings.max_black, largest=True),
        Limit("min_luma", "too dark", lambda clip: clip.luma, settings.min_luma, largest=False),
        Limit("min_motion", "near-static", lambda clip: clip.motion, settings.min_motion, largest=False),
        Limit("max_motion", "too much motion", lambda clip: clip.motion, settings.max_motion, largest=True),
        Limit("min_sharpness", "blurred", lambda clip: clip.sharpness, settings.min_sharpness, largest=False),
        Limit("max_flicker", "flicker", lambda clip: clip.flicker, settings.max_flicker, largest=True),
    )


@dataclass(frozen=True)
class Filtered:
    """Every clip, in order, with `refused`, `flags` and `crop` set; and what each limit was cut from."""

    clips: list[Clip]
    distributions: list[Distribution]


def filter_clips(clips: Sequence[Clip], settings: FilterConfig) -> Filtered:
    """Limits first, on each clip alone; then duplicates, among those that are left."""
    asked = limits(settings)
    judged = [_judged(clip, asked, crop_bars=settings.crop_bars) for clip in clips]
    staying = [place for place, clip in enumerate(judged) if clip.refused is None]
    compared = compare_clips([judged[place] for place in staying], settings.duplicate_bits)
    for twin in compared.twins:
        better = judged[staying[twin.better]].name
        reason = f"duplicate: {twin.bits:.1f} bits from {better}, filter.duplicate_bits is {settings.duplicate_bits:g}"
        judged[staying[twin.clip]] = replace(judged[staying[twin.clip]], refused=reason)
    seen = [
        _distribution(
            limit.setting,
            limit.threshold,
            sum(limit.refuses(clip.measures) is not None for clip in clips),
            [limit.value(clip.measures) for clip in clips],
        )
        for limit in asked
    ]
    seen.append(_distribution("duplicate_bits", settings.duplicate_bits, len(compared.twins), compared.nearest))
    return Filtered(judged, [one for one in seen if one is not None])


def _judged(clip: Clip, asked: Sequence[Limit], *, crop_bars: bool) -> Clip:
    reason = next((told for limit in asked if (told := limit.refuses(clip.measures))), None)
    bars = clip.measures.bars
    flags = ("letterbox",) if bars else ()
    return replace(clip, refused=reason, flags=flags, crop=bars if crop_bars else None)


def _distribution(setting: str, threshold: float | None, refused: int, measured: Sequence[float | None]) -> Distribution | None:
    """None where no clip has been measured."""
    values = np.array([value for value in measured if value is not None])
    if not len(values):
        return None
    counts, edges = np.histogram(values, bins=_BINS)
    return Distribution(
        setting=setting,
        threshold=threshold,
        refused=refused,
        clips=len(values),
        percentiles={str(part): round(float(np.percentile(values, part)), 5) for part in _PERCENTILES},
        edges=tuple(round(float(edge), 5) for edge in edges),
        counts=tuple(int(count) for count in counts),
    )


def distribution_row(distribution: Distribution) -> dict[str, object]:
    """For filter.json."""
    return asdict(distribution)


def count_reasons(clips: Sequence[Clip]) -> list[tuple[str, int]]:
    """(reason in a word or two, clips), most frequent first."""
    return Counter(clip.refused.split(":")[0] for clip in clips if clip.refused).most_common()
