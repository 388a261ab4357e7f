"""The strength sweep: what more of the adapter gains in style, what it costs, and where it stops paying."""

from collections.abc import Sequence

import numpy as np

from mochi_lora.evaluation.paired import BASE, DRIFT, Design, oriented, select
from mochi_lora.evaluation.results import Missing, Row, StrengthPoint, Sweep
from mochi_lora.evaluation.statistics import spearman
from mochi_lora.measures.catalogue import MEASURES

_FEWEST_FOR_A_KNEE = 4
# Distance from the chord, as a share of its legs. A straight trade-off has no knee; noise alone reaches some hundredths.
_CLEAR = 0.1


def sweep(rows: Sequence[Row], design: Design, adapter: str = "adapter") -> Sweep | Missing:
    """Means over the trigger prompts at every strength of `adapter`; the base is strength 0, which it equals bit for bit.

    Only prompts and seeds that every strength has are averaged, so that points differ by the strength alone.
    """
    levels = sorted({row.strength for row in rows if row.adapter == adapter and row.prompt_set == "trigger"} - {0.0})
    clips = {0.0: select(rows, "trigger", BASE), **{level: select(rows, "trigger", adapter, level) for level in levels}}
    shared = set.intersection(*({(row.prompt, row.seed) for row in group} for group in clips.values()))
    if not levels or not shared:
        return Missing("sweep", "no trigger prompt was rendered at strength 0 and at another")
    points = tuple(_point(level, [row for row in group if (row.prompt, row.seed) in shared]) for level, group in clips.items())
    style = design.primaries.get("style", "")
    if any(style not in point.values for point in points):
        return Sweep(points, None, None)
    gain = oriented(style, np.array([point.values[style] for point in points]))
    return Sweep(points, spearman([point.strength for point in points], gain.tolist()), _knee(points, gain, design))


def _point(strength: float, rows: Sequence[Row]) -> StrengthPoint:
    """Prompts count alike however many seeds they have. A measure that some clip lacks has no mean here."""
    values = {}
    for measure in MEASURES:
        by_prompt: dict[str, list[float]] = {}
        for row in rows:
            if measure in row.values:
                by_prompt.setdefault(row.prompt, []).append(row.values[measure])
        if sum(map(len, by_prompt.values())) == len(rows):
            values[measure] = float(np.mean([np.mean(seeds) for seeds in by_prompt.values()]))
    if strength == 0:
        values[DRIFT] = 1.0
    return StrengthPoint(strength, values)


def _knee(points: Sequence[StrengthPoint], style: np.ndarray, design: Design) -> float | None:
    """Kneedle (Satopaa et al. 2011) on style gained against what was paid, both from 0 to 1: farthest above the chord.

    None for fewer than four points, without a gain, where nothing was paid, or where gain and cost go hand in hand.
    """
    gain, cost = style - style[0], _cost(points, design)
    if len(points) < _FEWEST_FOR_A_KNEE or cost is None or gain.max() <= 0:
        return None
    above = gain / gain.max() - cost
    best = int(above.argmax())
    return points[best].strength if above[best] >= _CLEAR else None


def _cost(points: Sequence[StrengthPoint], design: Design) -> np.ndarray | None:
    """Mean of what suffers, each from 0 to 1: content drift, alignment, quality; None where nothing does.

    A loss inside its margin is none: scaled to 0..1 it would be noise.
    """
    paid = []
    for measure in (DRIFT, *(design.primaries[axis] for axis in ("alignment", "quality") if axis in design.primaries)):
        if all(measure in point.values for point in points):
            values = oriented(measure, np.array([point.values[measure] for point in points]))
            loss = np.maximum(values[0] - values, 0.0)
            if loss.max() > design.margins.get(measure, 0.0):
                paid.append(loss / loss.max())
    return np.mean(paid, axis=0) if paid else None
