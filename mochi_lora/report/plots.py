"""Plots as inline SVG. Colours are CSS classes of the page (`base`, `adapter`), so that they follow dark mode and print."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Literal

from mochi_lora.evaluation.results import Interval
from mochi_lora.report.wording import number

Kind = Literal["base", "adapter"]

_WIDTH, _HEIGHT = 340, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 18, 34, 44
_BAR_WIDTH, _BAR_HEIGHT = 220, 40
_TICK_ROOM = 32  # pixels between x ticks
_DODGE = 4  # pixels between lines that share their x values, so that their intervals do not hide each other


@dataclass(frozen=True)
class Line:
    """One series. `intervals` and `labels` are empty or one per point."""

    kind: Kind
    points: tuple[tuple[float, float], ...]
    intervals: tuple[tuple[float, float], ...] = ()
    labels: tuple[str, ...] = ()
    hollow: frozenset[int] = frozenset()  # positions of points drawn as rings
    joined: bool = True


@dataclass(frozen=True)
class Axes:
    """Labels of a chart; `marks` are vertical lines (x, text)."""

    x: str
    y: str
    x_ticks: tuple[float, ...] = ()
    marks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Scale:
    """From data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(description: str, lines: Sequence[Line], axes: Axes, *, y_range: tuple[float, float] | None = None) -> str:
    """A chart of `lines` as an <svg> whose text alternative is `description`; points that are not finite are left out.

    `y_range` makes charts beside each other comparable; by default the data's own.
    """
    lines = [_finite(line) for line in lines]
    xs = [x for line in lines for x, _ in line.points] + [x for x, _ in axes.marks]
    assert xs, "a chart of nothing"
    x = _scale(min(xs), max(xs), _LEFT + 12, _WIDTH - _RIGHT - 8)
    y_low, y_high = y_range or extent(lines)
    y = _scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP + 4)
    parts = [*_frame(axes, x, y, sorted(set(xs)))]
    for index, line in enumerate(lines):
        shift = (index - (len(lines) - 1) / 2) * _DODGE if line.intervals else 0.0
        parts += _series(line, x, y, shift)
    return _svg("chart", _WIDTH, _HEIGHT, description, parts)


def histogram(description: str, edges: Sequence[float], counts: Sequence[int], axes: Axes) -> str:
    """Columns of `counts` between `edges` (one more, ascending) as an <svg> whose text alternative is `description`."""
    assert len(edges) == len(counts) + 1, "an edge on both sides of every column"
    ends = [*edges, *(x for x, _ in axes.marks)]
    x = _scale(min(ends), max(ends), _LEFT + 4, _WIDTH - _RIGHT)
    y = _Scale(0, max(4, *counts) * 1.06, _HEIGHT - _BOTTOM, _TOP + 4)
    whole = tuple(tick for tick in nice_ticks(y.low, y.high) if tick == round(tick))
    parts = _frame(replace(axes, y_ticks=whole, x_ticks=tuple(nice_ticks(x.low, x.high))), x, y, [])
    for (left, right), count in zip(pairwise(edges), counts, strict=True):
        if count:
            column = {"x": x(left) + 0.5, "y": y(count), "width": max(1.0, x(right) - x(left) - 1), "height": y(0) - y(count)}
            parts.append(_tag("rect", "column", **column))
    return _svg("chart", _WIDTH, _HEIGHT, description, parts)


def extent(lines: Sequence[Line]) -> tuple[float, float]:
    """Lowest and highest finite value of `lines`, intervals included."""
    values = [value for line in lines for _, value in line.points]
    values += [end for line in lines for pair in line.intervals for end in pair]
    finite = [value for value in values if math.isfinite(value)]
    return min(finite), max(finite)


def interval_bar(interval: Interval, *, allowed_loss: float | None = None, low_is_better: bool = False) -> str:
    """A difference and its interval against zero; right is always better. The allowed loss is the shaded strip below zero."""
    sign = -1.0 if low_is_better else 1.0
    ends = [sign * end for end in (interval.low, interval.value, interval.high) if math.isfinite(end)]
    if not ends:
        return ""
    loss = allowed_loss or 0.0
    x = _scale(min(*ends, 0.0, -loss), max(*ends, 0.0), 10, _BAR_WIDTH - 10)
    middle = 14
    parts = []
    if loss:
        parts.append(_tag("rect", "allowed", x=x(-loss), y=2, width=x(0) - x(-loss), height=_BAR_HEIGHT - 16))
    parts += [
        _tag("line", "zero", x1=x(0), x2=x(0), y1=2, y2=_BAR_HEIGHT - 14),
        _text("0", "tick", x(0), _BAR_HEIGHT - 3, "middle"),
    ]
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        parts.append(_tag("line", "interval", x1=x(sign * interval.low), x2=x(sign * interval.high), y1=middle, y2=middle))
    if math.isfinite(interval.value):
        parts.append(_tag("circle", "dot", cx=x(sign * interval.value), cy=middle, r=4.5))
    said = f"Difference {number(interval.value, signed=True)}, interval {number(interval.low)} to {number(interval.high)}"
    return _svg("bar", _BAR_WIDTH, _BAR_HEIGHT, said, parts)


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers inside [low, high], roughly `about` of them."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _finite(line: Line) -> Line:
    """`line` without the points that cannot be drawn."""
    keep = [index for index, (x, y) in enumerate(line.points) if math.isfinite(x) and math.isfinite(y)]
    return Line(
        line.kind,
        tuple(line.points[index] for index in keep),
        tuple(line.intervals[index] for index in keep) if line.intervals else (),
        tuple(line.labels[index] for index in keep) if line.labels else (),
        frozenset(keep.index(index) for index in line.hollow if index in keep),
        line.joined,
    )


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    """With a little air on both sides; a single value gets the middle."""
    air = (high - low) * 0.06 or max(abs(high) * 0.1, 1e-6)
    return _Scale(low - air, high + air, start, end)


def _frame(axes: Axes, x: _Scale, y: _Scale, xs: Sequence[float]) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [_text(axes.y, "axis", 0, 13, "start"), _text(axes.x, "axis", (_LEFT + right) / 2, _HEIGHT - 6, "middle")]
    ticks = axes.y_ticks or tuple(nice_ticks(y.low, y.high))
    places = _places(ticks)
    for tick in ticks:
        parts.append(_tag("line", "grid", x1=_LEFT, x2=right, y1=y(tick), y2=y(tick)))
        parts.append(_text(number(tick, places), "tick", _LEFT - 6, y(tick) + 4, "end"))
    crowded = any(x(b) - x(a) < _TICK_ROOM for a, b in pairwise(xs))
    x_ticks = axes.x_ticks or (tuple(nice_ticks(x.low, x.high)) if crowded else tuple(xs))
    x_places = _places(x_ticks)
    parts += [_text(number(tick, x_places), "tick", x(tick), bottom + 17, "middle") for tick in x_ticks]
    parts.append(_tag("line", "axisline", x1=_LEFT, x2=right, y1=bottom, y2=bottom))
    for place, text in axes.marks:
        side = "end" if x(place) > (_LEFT + right) / 2 else "start"
        parts.append(_tag("line", "mark", x1=x(place), x2=x(place), y1=_TOP - 10, y2=bottom))
        parts.append(_text(text, "marktext", x(place) + (-5 if side == "end" else 5), _TOP - 3, side))
    return parts


def _places(ticks: Sequence[float]) -> int:
    """Decimals needed to tell `ticks` apart exactly, at most five."""
    return next((places for places in range(5) if all(abs(tick - round(tick, places)) < 1e-9 for tick in ticks)), 5)


def _series(line: Line, x: _Scale, y: _Scale, shift: float) -> list[str]:
    parts = []
    if line.joined and len(line.points) > 1:
        path = " ".join(f"{x(a) + shift:.1f},{y(b):.1f}" for a, b in line.points)
        parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
    for (place, _), (low, high) in zip(line.points, line.intervals, strict=False):
        if math.isfinite(low) and math.isfinite(high):
            parts.append(_tag("line", f"whisker {line.kind}", x1=x(place) + shift, x2=x(place) + shift, y1=y(low), y2=y(high)))
    for index, (a, b) in enumerate(line.points):
        ring = " hollow" if index in line.hollow else ""
        parts.append(_tag("circle", f"point {line.kind}{ring}", cx=x(a) + shift, cy=y(b), r=3.6))
    before = -math.inf
    for (a, b), text in zip(line.points, line.labels, strict=False):
        # Two labels at one height would cover each other.
        if x(a) - before < _TICK_ROOM:
            parts.append(_text(text, "pointtext", x(a) - 7, min(y(b) + 16, _HEIGHT - _BOTTOM - 5), "end"))
        else:
            parts.append(_text(text, "pointtext", x(a), y(b) - 8, "middle"))
        before = x(a)
    return parts


def _svg(kind: str, width: int, height: int, description: str, parts: Sequence[str]) -> str:
    start = f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
    return f"{start}{''.join(parts)}</svg>"


def _tag(name: str, kind: str, **attributes: float) -> str:
    written = " ".join(f'{key}="{value:.1f}"' for key, value in attributes.items())
    return f'<{name} class="{kind}" {written}/>'


def _text(text: str, kind: str, x: float, y: float, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
