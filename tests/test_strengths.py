"""The sweep: order, knee, and which clips a point averages."""

import numpy as np
import pytest
from evaluation_rows import ALIGN, LEVELS, QUALITY, STYLE, clips, design

from mochi_lora.evaluation.results import Missing, Row, Sweep
from mochi_lora.evaluation.strengths import sweep

LEVELS_OF_STRENGTH = (0.25, 0.5, 0.75, 1.0, 1.25)


def swept(style, drift=lambda s: 1.0, alignment=lambda s: 0.0, strengths=LEVELS_OF_STRENGTH, noise=0.0) -> list[Row]:
    rows = clips("base", LEVELS, noise=noise)
    for level in strengths:
        values = {STYLE: 0.3 + style(level), ALIGN: 0.25 + alignment(level), QUALITY: 0.9, "drift.content": drift(level)}
        rows += clips("adapter", values, strength=level, noise=noise)
    return rows


def found(rows: list[Row]) -> Sweep:
    result = sweep(rows, design())
    assert isinstance(result, Sweep)
    return result


def test_points_run_from_the_base_up_and_style_follows_strength():
    result = found(swept(lambda s: 0.2 * s))
    assert [point.strength for point in result.points] == [0.0, *LEVELS_OF_STRENGTH]
    gains = [point.values[STYLE] - result.points[0].values[STYLE] for point in result.points]
    assert gains == pytest.approx([0.2 * point.strength for point in result.points])
    assert result.spearman == pytest.approx(1)
    assert result.points[0].values["drift.content"] == 1.0


def test_style_that_falls_with_strength_is_seen():
    assert found(swept(lambda s: -0.2 * s)).spearman == pytest.approx(-1)


def test_the_knee_is_where_style_stops_growing_while_the_content_goes():
    """Style is all there at 0.5; drift grows with the square of strength."""
    result = found(swept(lambda s: 0.4 * min(1, s / 0.5), drift=lambda s: 1 - 0.3 * s**2))
    assert result.knee == 0.5


def test_alignment_that_breaks_late_puts_the_knee_before_the_break():
    result = found(swept(lambda s: 0.3 * s, alignment=lambda s: -0.2 if s > 0.8 else 0.0))
    assert result.knee == 0.75


def test_a_straight_trade_has_no_knee():
    assert found(swept(lambda s: 0.3 * s, drift=lambda s: 1 - 0.3 * s)).knee is None


def test_a_loss_inside_its_margin_is_no_cost():
    assert found(swept(lambda s: 0.4 * min(1, s / 0.5), alignment=lambda s: -0.009 * (s > 0.8))).knee is None


def test_no_gain_has_no_knee():
    with np.errstate(all="raise"):
        assert found(swept(lambda s: -0.1 * s, drift=lambda s: 1 - 0.3 * s**2)).knee is None


def test_three_points_have_no_knee():
    result = found(swept(lambda s: 0.4 * min(1, s / 0.5), lambda s: 1 - 0.3 * s**2, strengths=(0.5, 1.0)))
    assert len(result.points) == 3
    assert result.knee is None


def test_points_average_the_clips_that_all_strengths_have():
    """The sweep may have fewer prompts than the comparison at strength 1: easy prompts must not look like strength."""
    rows = clips("base", LEVELS) + clips("adapter", LEVELS)
    few = [row for row in clips("adapter", LEVELS, strength=0.5) if row.prompt.endswith((" 1", " 2"))]
    result = found(rows + few)
    expected = [row.values[STYLE] for row in rows if row.adapter == "base" and row.prompt.endswith((" 1", " 2"))]
    assert result.points[0].values[STYLE] == pytest.approx(np.mean(expected))


def test_a_measure_that_a_clip_lacks_has_no_mean_at_that_strength():
    rows = swept(lambda s: 0.2 * s)
    del rows[-1].values[STYLE]
    result = found(rows)
    assert STYLE not in result.points[-1].values
    assert STYLE in result.points[-2].values
    assert (result.spearman, result.knee) == (None, None)


def test_without_a_sweep_there_is_a_reason():
    assert isinstance(sweep(clips("base", LEVELS), design()), Missing)
    assert isinstance(sweep(clips("adapter", LEVELS), design()), Missing)
