"""Which plots a report has: from the parts of an evaluation to charts with their captions."""

from collections.abc import Iterator
from dataclasses import dataclass

from mochi_lora.evaluation.results import BandLoss, Curve, Evaluation, Interval, Sweep
from mochi_lora.measures.catalogue import MEASURES
from mochi_lora.report.plots import Axes, Kind, Line, extent, line_chart
from mochi_lora.report.wording import direction, label, measures_to_plot, number


@dataclass(frozen=True)
class Panel:
    """One chart and the words above it."""

    title: str
    note: str
    svg: str


def sweep_panels(evaluation: Evaluation, sweep: Sweep) -> list[Panel]:
    """Each measure against strength, then style against alignment as a path through the strengths."""
    names = measures_to_plot(evaluation, [point.values for point in sweep.points])
    marks = () if sweep.knee is None else ((sweep.knee, "knee"),)
    panels = []
    for name in names:
        points = tuple((point.strength, point.values[name]) for point in sweep.points if name in point.values)
        said = f"{label(name)} by strength: " + ", ".join(f"{number(y)} at {number(x, 2)}" for x, y in points)
        svg = line_chart(
            said, [Line("adapter", points)], Axes("Strength of the adapter", _first_upper(direction(name)), marks=marks)
        )
        panels.append(Panel(label(name), "", svg))
    return panels + list(_trade_off(names, sweep))


def _trade_off(names: list[str], sweep: Sweep) -> Iterator[Panel]:
    style = [name for name in names if MEASURES[name].axis == "style"]
    alignment = [name for name in names if MEASURES[name].axis == "alignment"]
    if not style or not alignment:
        return
    both = [point for point in sweep.points if {style[0], alignment[0]} <= set(point.values)]
    if len(both) < 2:
        return
    points = tuple((point.values[style[0]], point.values[alignment[0]]) for point in both)
    strengths = tuple(f"{point.strength:g}" for point in both)
    said = "Style and alignment together: " + ", ".join(
        f"strength {strength}: {number(x)} and {number(y)}" for strength, (x, y) in zip(strengths, points, strict=True)
    )
    svg = line_chart(
        said,
        [Line("adapter", points, labels=strengths)],
        Axes(f"{label(style[0])}, {direction(style[0])}", f"{label(alignment[0])}, {direction(alignment[0])}"),
    )
    yield Panel("Style against alignment", "Each point is one strength, written beside it.", svg)


def curve_panels(evaluation: Evaluation, curve: Curve) -> list[Panel]:
    """Each measure, then the held-out loss, against training steps; the recommended checkpoint is marked."""
    series = {
        name: [(point.step, point.values[name], point.admissible) for point in curve.points if name in point.values]
        for name in measures_to_plot(evaluation, [point.values for point in curve.points])
    }
    titles = {name: (label(name), direction(name)) for name in series}
    if losses := [(p.step, p.held_out_loss, p.admissible) for p in curve.points if p.held_out_loss is not None]:
        series["loss"], titles["loss"] = losses, ("Held-out loss", "error on clips it never saw, lower is better")
    kept = [point.step for point in curve.points if point.adapter == curve.recommended]
    marks = tuple((float(step), "keep") for step in kept[:1])
    panels = []
    for name, rows in series.items():
        title, note = titles[name]
        points = tuple((float(step), value) for step, value, _ in rows)
        rings = frozenset(index for index, (_, _, admissible) in enumerate(rows) if not admissible)
        said = f"{title} by training step: " + ", ".join(f"{number(y)} at {x:.0f}" for x, y in points)
        svg = line_chart(said, [Line("adapter", points, hollow=rings)], Axes("Training steps", _first_upper(note), marks=marks))
        panels.append(Panel(title, "", svg))
    return panels


def loss_panels(losses: tuple[BandLoss, ...]) -> list[Panel]:
    """Base and adapter by noise level, on held-out and on training clips, on one common scale."""
    held_out = [
        _band_line("base", losses, [row.base_held_out for row in losses]),
        _band_line("adapter", losses, [row.adapter_held_out for row in losses]),
    ]
    training = [
        _band_line("base", losses, [row.base_training for row in losses]),
        _band_line("adapter", losses, [row.adapter_training for row in losses]),
    ]
    ticks = tuple(row.sigma for row in losses) if len(losses) <= 6 else ()
    common = extent([*held_out, *training])
    panels = []
    for title, note, lines in (
        ("Clips it never saw", "What counts: is the adapter below the base here too?", held_out),
        ("Its training clips", "Lower than the base here alone means learning by heart", training),
    ):
        base, adapter = (", ".join(number(y) for _, y in line.points) for line in lines)
        said = f"{title}, error from the lowest to the highest noise level. Base: {base}. Adapter: {adapter}."
        axes = Axes("Noise level sigma (0 clean, 1 pure noise)", "Velocity error (squared)", x_ticks=ticks)
        panels.append(Panel(title, note, line_chart(said, lines, axes, y_range=common)))
    return panels


def _band_line(kind: Kind, losses: tuple[BandLoss, ...], values: list[Interval]) -> Line:
    points = tuple((row.sigma, value.value) for row, value in zip(losses, values, strict=True))
    return Line(kind, points, intervals=tuple((value.low, value.high) for value in values))


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
