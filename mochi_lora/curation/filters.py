"""Which clips stay, why each of the others does not, and what every limit was cut from."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mochi_lora.config.curation import FilterConfig
from mochi_lora.curation.clip_measures import ClipMeasures
from mochi_lora.curation.duplicates import find_twins
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
    """The values a limit was cut from, over all clips, refused ones too."""

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


def filter_clips(clips: Sequence[Clip], settings: FilterConfig) -> list[Clip]:
    """Every clip of `clips`, in order, with `refused`, `flags` and `crop` set."""
    asked = limits(settings)
    judged = [_judged(clip, asked, crop_bars=settings.crop_bars) for clip in clips]
    if settings.duplicate_bits is None:
        return judged
    staying = [place for place, clip in enumerate(judged) if clip.refused is None]
    for twin in find_twins([judged[place] for place in staying], settings.duplicate_bits):
        better = judged[staying[twin.better]].name
        reason = f"duplicate: {twin.bits:.1f} bits from {better}, filter.duplicate_bits is {settings.duplicate_bits:g}"
        judged[staying[twin.clip]] = replace(judged[staying[twin.clip]], refused=reason)
    return judged


def _judged(clip: Clip, asked: Sequence[Limit], *, crop_bars: bool) -> Clip:
    reason = next((told for limit in asked if (told := limit.refuses(clip.measures))), None)
    bars = clip.measures.bars
    flags = ("letterbox",) if bars else ()
    return replace(clip, refused=reason, flags=flags, crop=bars if crop_bars else None)


def distributions(clips: Sequence[Clip], settings: FilterConfig) -> list[Distribution]:
    """One per limit that has been measured on any clip."""
    found = []
    for limit in limits(settings):
        values = np.array([value for clip in clips if (value := limit.value(clip.measures)) is not None])
        if not len(values):
            continue
        counts, edges = np.histogram(values, bins=_BINS)
        found.append(
            Distribution(
                setting=limit.setting,
                threshold=limit.threshold,
                refused=sum(limit.refuses(clip.measures) is not None for clip in clips),
                clips=len(values),
                percentiles={str(part): round(float(np.percentile(values, part)), 5) for part in _PERCENTILES},
                edges=tuple(round(float(edge), 5) for edge in edges),
                counts=tuple(int(count) for count in counts),
            )
        )
    return found


def distribution_row(distribution: Distribution) -> dict[str, object]:
    """For filter.json."""
    return asdict(distribution)


def count_reasons(clips: Sequence[Clip]) -> list[tuple[str, int]]:
    """(reason in a word or two, clips), most frequent first."""
    return Counter(clip.refused.split(":")[0] for clip in clips if clip.refused).most_common()
