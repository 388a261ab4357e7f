"""Bleed: a share of what the trigger does, and no number where the trigger does nothing."""

import pytest
from evaluation_rows import LEVELS, STYLE, clips, design, shifted

from mochi_lora.evaluation.bleed import bleed
from mochi_lora.evaluation.results import Row


def rows(trigger: float, plain: float, unrelated: float, **where) -> list[Row]:
    changes = {"trigger": trigger, "plain": plain, "unrelated": unrelated}
    found = []
    for prompt_set, change in changes.items():
        found += clips("base", LEVELS, prompt_set=prompt_set, **where)
        found += clips("adapter", shifted(style=change) | {"drift.content": 0.6}, prompt_set=prompt_set, **where)
    return found


def test_bleed_is_the_share_of_the_change_with_the_trigger():
    (plain, unrelated), missing = bleed(rows(0.4, 0.3, 0.04), design())
    assert missing == ()
    assert (plain.prompt_set, unrelated.prompt_set) == ("plain", "unrelated")
    assert plain.ratio.value == pytest.approx(0.75, abs=0.02)
    assert unrelated.ratio.value == pytest.approx(0.1, abs=0.02)
    for one in (plain, unrelated):
        assert one.ratio.low < one.ratio.value < one.ratio.high
        assert one.ratio.high - one.ratio.low < 0.05
        assert one.drift == pytest.approx(0.6, abs=0.05)


def test_no_change_is_no_bleed_and_the_opposite_change_is_negative():
    (none, opposite), _ = bleed(rows(0.4, 0.0, -0.2), design())
    assert none.ratio.value == pytest.approx(0, abs=0.02)
    assert opposite.ratio.value == pytest.approx(-0.5, abs=0.02)


@pytest.mark.parametrize("trigger", [0.0, -0.3])
def test_without_a_change_to_compare_with_nothing_is_divided(trigger):
    found, missing = bleed(rows(trigger, 0.1, 0.1), design())
    assert found == ()
    assert [one.what for one in missing] == ["bleed"]
    assert "does not clearly change" in missing[0].because


def test_less_is_more_where_the_measure_is_a_distance():
    measure = "style.distance"
    flipped = [
        Row(row.video, row.prompt_set, row.prompt, row.seed, row.adapter, row.strength, {measure: 5 - row.values[STYLE]})
        for row in rows(0.4, 0.2, 0.0)
    ]
    primaries = {**design().primaries, "style": measure}
    (plain, _), _ = bleed(flipped, design(primaries=primaries))
    assert plain.ratio.value == pytest.approx(0.5, abs=0.02)
    assert plain.drift is None


def test_sets_that_were_not_made_are_missing():
    only = [row for row in rows(0.4, 0.3, 0.1) if row.prompt_set != "unrelated"]
    found, missing = bleed(only, design())
    assert [one.prompt_set for one in found] == ["plain"]
    assert "0 unrelated prompts" in missing[0].because


def test_few_prompts_have_no_bleed():
    found, missing = bleed(rows(0.4, 0.3, 0.1, prompts=4), design())
    assert found == ()
    assert "4 trigger prompts" in missing[0].because
