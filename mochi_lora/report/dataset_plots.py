"""The plots of a data set: lengths, sizes, motion, caption tokens. Each is titled with what it shows."""

import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mochi_lora.report.dataset_problems import clips
from mochi_lora.report.dataset_rows import ClipRow, motion_limit
from mochi_lora.report.panels import Panel
from mochi_lora.report.plots import Axes, Line, histogram, line_chart
from mochi_lora.report.wording import number, percent
from mochi_lora.spec import FRAMES_PER_SECOND, TEXT_TOKENS

_BINS = 16
_NEAR_THE_LIMIT = 0.6  # of T5's 256 tokens, from where the limit is worth a mark
_SAME_SHAPE = 1.05  # ratio of aspect ratios


def dataset_panels(rows: Sequence[ClipRow], least_motion: float | None) -> list[Panel]:
    """One panel per question that the data can answer; `least_motion` is filter.min_motion."""
    made = [_lengths(rows), _sizes(rows), _motion(rows, least_motion), _tokens(rows)]
    return [panel for panel in made if panel]


def _lengths(rows: Sequence[ClipRow]) -> Panel | None:
    films = [row for row in rows if row.plan.seconds > 0]
    if not films:
        return None
    seconds = [row.plan.seconds for row in films]
    unused = sum(row.plan.unused_seconds for row in films) / sum(seconds)
    buckets = sorted({row.plan.bucket.frames / FRAMES_PER_SECOND for row in films})
    title = f"Half of the clips are {number(statistics.median(seconds))} s or longer; {percent(unused)} of the film is not used"
    note = "Dashed: how long the clip shapes are. What lies to the right of the last is cut off."
    marks = tuple((value, f"{number(value)} s") for value in buckets[-1:])
    marks = (*((value, "") for value in buckets[:-1]), *marks)
    return Panel(title, note, _histogram(title, seconds, Axes("Seconds per clip", "Clips", marks=marks)))


def _sizes(rows: Sequence[ClipRow]) -> Panel | None:
    if not rows:
        return None
    sizes = Counter((row.plan.width, row.plan.height) for row in rows)
    shapes = sorted({(row.plan.bucket.width, row.plan.bucket.height) for row in rows})
    ratios = [width / height for width, height in sizes]
    if len(sizes) == 1:
        ((width, height),) = sizes
        title = f"All clips are {width}x{height} pixels"
    elif max(ratios) <= min(ratios) * _SAME_SHAPE:
        title = f"{len(sizes)} sizes of one shape, about {number(statistics.median(ratios), 2)} to 1"
    else:
        title = f"{len(sizes)} sizes, from {number(min(ratios), 2)} to {number(max(ratios), 2)} times as wide as high"
    found = Line("adapter", tuple(sizes), labels=tuple(f"{count:,}" for count in sizes.values()), joined=False)
    rings = Line("base", tuple(shapes), hollow=frozenset(range(len(shapes))), joined=False)
    note = "Dots: clips as they come, with their number. Grey rings: shapes they are made into."
    return Panel(title, note, line_chart(title, [rings, found], Axes("Width in pixels", "Height in pixels")))


def _motion(rows: Sequence[ClipRow], least: float | None) -> Panel | None:
    values = [row.motion for row in rows if row.motion is not None]
    limit = motion_limit(rows, least)
    if limit is None:
        return None
    still = sum(value < limit for value in values)
    title = f"{clips(still)} with little motion" if still else "Everything moves about as much as the rest"
    note = "Left of the dashed line, a clip counts as nearly still here."
    axes = Axes("Percent of the short side per 1/8 s", "Clips", marks=((limit, ""),))
    return Panel(title, note, _histogram(title, values, axes))


def _tokens(rows: Sequence[ClipRow]) -> Panel | None:
    values = [float(row.counted.tokens) for row in rows if row.counted]
    if not values:
        return None
    cut = sum(row.counted.truncated for row in rows if row.counted)
    title = f"Captions have {min(values):.0f} to {max(values):.0f} T5 tokens"
    title = f"{cut:,} of the captions {'is' if cut == 1 else 'are'} longer than T5 reads" if cut else title
    note = f"Mochi reads {TEXT_TOKENS}; short captions leave to chance what the words mean."
    marks = ((float(TEXT_TOKENS), f"{TEXT_TOKENS}"),) if max(values) > _NEAR_THE_LIMIT * TEXT_TOKENS else ()
    return Panel(title, note, _histogram(title, values, Axes("T5 tokens per caption", "Clips", marks=marks)))


def _histogram(said: str, values: Sequence[float], axes: Axes) -> str:
    low, high = min(values), max(values)
    air = 0.0 if high > low else max(abs(high) * 0.1, 0.1)  # one value is one column in the middle
    counts, edges = np.histogram(values, bins=_BINS if high > low else 3, range=(low - air, high + air))
    return histogram(said, [float(edge) for edge in edges], [int(count) for count in counts], axes)
