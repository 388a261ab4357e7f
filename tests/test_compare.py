"""Adapter against base: which clips are compared, which way is better, and what is concluded."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_rows import ALIGN, LEVELS, QUALITY, STYLE, clips, design, shifted

from mochi_lora.errors import UserError
from mochi_lora.evaluation.compare import compare
from mochi_lora.evaluation.results import Comparison, Row, Tally

PRIMARIES = (STYLE, ALIGN, QUALITY)


def compared(rows: list[Row], *, measures=PRIMARIES, **changes) -> dict[tuple[str, str], Comparison]:
    comparisons, missing = compare(rows, measures, design(**changes))
    assert missing == ()
    return {(one.measure, one.prompt_set): one for one in comparisons}


def both(change: dict[str, float], **where) -> list[Row]:
    return clips("base", LEVELS, **where) + clips("adapter", change, **where)


def test_style_up_and_nothing_lost():
    found = compared(both(shifted(style=0.2)))
    style = found[STYLE, "trigger"]
    assert style.difference.value == pytest.approx(0.2, abs=0.003)
    assert style.adapter - style.base == pytest.approx(style.difference.value)
    assert style.difference.low > 0
    assert (style.conclusion, style.tally, style.prompts, style.margin) == ("better", Tally(12, 0, 0), 12, None)
    assert style.p_value == 2 * 2**-12
    assert {found[measure, "trigger"].conclusion for measure in (ALIGN, QUALITY)} <= {"better", "no worse"}
    assert found[ALIGN, "trigger"].margin == 0.01


@pytest.mark.parametrize(
    ("change", "conclusion"),
    [(0.0, "no worse"), (-0.004, "no worse"), (-0.05, "worse"), (0.05, "better")],
)
def test_a_measure_with_a_margin_may_lose_less_than_that(change, conclusion):
    rows = both(shifted(alignment=change), prompts=20)
    centred = _centred(rows, ALIGN, change)
    assert compared(centred)[ALIGN, "trigger"].conclusion == conclusion


def _centred(rows: list[Row], measure: str, change: float) -> list[Row]:
    """The adapter's mean difference made exact, so that noise decides no case."""
    by = {name: [row.values[measure] for row in rows if row.adapter == name] for name in ("base", "adapter")}
    excess = np.mean(by["adapter"]) - np.mean(by["base"]) - change
    return [
        replace(row, values=row.values | {measure: row.values[measure] - excess}) if row.adapter == "adapter" else row
        for row in rows
    ]


def test_a_loss_that_may_or_may_not_exceed_the_margin_is_left_open():
    rows = _centred(both(shifted(alignment=0.0), prompts=8, noise=0.05), ALIGN, -0.008)
    one = compared(rows)[ALIGN, "trigger"]
    assert one.difference.low < -0.01 < 0 < one.difference.high
    assert one.conclusion == "unclear"


@pytest.mark.parametrize(("change", "conclusion"), [(-0.2, "worse"), (0.0, "unclear")])
def test_style_is_tested_both_ways(change, conclusion):
    one = compared(_centred(both(shifted(style=change)), STYLE, change))[STYLE, "trigger"]
    assert one.conclusion == conclusion


@pytest.mark.parametrize(("change", "conclusion"), [(-0.1, "better"), (0.1, "worse")])
def test_less_is_better_where_the_catalogue_says_so(change, conclusion):
    measure = "quality.warp_error"
    rows = clips("base", LEVELS | {measure: 0.4}) + clips("adapter", shifted(style=0.2) | {measure: 0.4 + change})
    fixed = {
        "primaries": {"style": STYLE, "alignment": ALIGN, "quality": measure},
        "margins": {ALIGN: 0.01, measure: 0.02},
    }
    one = compared(rows, measures=(STYLE, ALIGN, measure), **fixed)[measure, "trigger"]
    assert one.difference.value == pytest.approx(change, abs=0.01)
    assert one.conclusion == conclusion
    assert one.tally == (Tally(12, 0, 0) if conclusion == "better" else Tally(0, 0, 12))


def test_context_is_never_tested():
    rows = clips("base", LEVELS | {"diversity": 0.5}) + clips("adapter", LEVELS | {"diversity": 0.1})
    one = compared(rows, measures=(*PRIMARIES, "diversity"))["diversity", "trigger"]
    assert (one.p_value, one.conclusion, one.primary) == (None, "context", False)


def test_the_base_has_not_drifted_from_itself():
    rows = clips("base", LEVELS) + clips("adapter", LEVELS | {"drift.content": 0.7})
    one = compared(rows, measures=(*PRIMARIES, "drift.content"))["drift.content", "trigger"]
    assert one.base == 1.0
    assert one.difference.value == pytest.approx(one.adapter - 1)


def test_quick_tests_nothing():
    for one in compared(both(shifted(style=0.2)), quick=True).values():
        assert (one.p_value, one.p_adjusted, one.conclusion) == (None, None, "indicative")


def test_only_primaries_on_trigger_prompts_are_adjusted():
    rows = both(shifted(style=0.2)) + both(shifted(style=0.1), prompt_set="plain")
    found = compared(rows)
    trigger, plain = found[STYLE, "trigger"], found[STYLE, "plain"]
    assert trigger.primary
    assert trigger.p_adjusted > trigger.p_value
    assert not plain.primary
    assert plain.p_adjusted is None
    assert plain.conclusion == "better"


def test_a_primary_that_was_not_measured_still_counts_in_the_adjustment():
    one = compared(both(shifted(style=0.2)), measures=(STYLE,))[STYLE, "trigger"]
    assert one.p_adjusted == pytest.approx(3 * one.p_value)


def test_primaries_are_concluded_after_the_adjustment():
    """Six of seven prompts agree: 4 of 128 patterns are as extreme, which is below 0.05 until it is tripled."""
    base = clips("base", LEVELS, prompts=7, seeds=1, noise=0.0)
    gains = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, -0.1]
    ours = [
        replace(row, adapter="adapter", strength=1.0, values={STYLE: row.values[STYLE] + gain})
        for row, gain in zip(base, gains, strict=True)
    ]
    one = compared(base + ours, measures=(STYLE,))[STYLE, "trigger"]
    assert one.p_value == 4 / 128
    assert one.p_adjusted == 12 / 128
    assert one.difference.low > 0
    assert one.conclusion == "unclear"


def test_six_prompts_are_too_few_for_the_style_test_and_seven_are_not():
    few, missing = compare(both(shifted(style=0.2), prompts=6), PRIMARIES, design())
    style = next(one for one in few if one.measure == STYLE)
    assert (style.p_value, style.conclusion) == (None, "unclear")
    assert style.difference.low > 0
    assert [(one.what, "fewer than 7" in one.because) for one in missing] == [("tests on trigger prompts", True)]
    assert compared(both(shifted(style=0.2), prompts=7))[STYLE, "trigger"].conclusion == "better"


def test_what_nobody_measured_is_missing_and_not_zero():
    comparisons, missing = compare(both(LEVELS), ("style.gram", STYLE), design())
    assert [one.measure for one in comparisons] == [STYLE]
    assert [one.what for one in missing] == ["style.gram"]


def test_prompts_that_lack_a_value_are_left_out_and_counted():
    rows = both(shifted(style=0.2))
    gone = [row for row in rows if row.prompt.endswith(" 3")]
    rows = [replace(row, values={}) if row in gone and row.adapter == "adapter" else row for row in rows]
    comparisons, missing = compare(rows, (STYLE,), design())
    assert comparisons[0].prompts == 11
    assert "1 of 12 trigger prompts" in missing[0].because


def test_one_prompt_has_no_interval():
    comparisons, missing = compare(both(LEVELS, prompts=1), (STYLE,), design())
    assert comparisons == ()
    assert "one prompt has no interval" in missing[0].because


@pytest.mark.parametrize("lacking", ["base", "adapter"])
def test_a_clip_without_its_counterpart_is_refused_by_name(lacking):
    rows = both(LEVELS)
    gone = next(row for row in rows if row.adapter == lacking)
    with pytest.raises(UserError, match=r"mp4: .*'trigger prompt 0'"):
        compare([row for row in rows if row is not gone], PRIMARIES, design())


def test_not_a_number_is_an_error_of_ours_that_names_the_clip():
    rows = both(LEVELS)
    rows[0].values[STYLE] = float("nan")
    with pytest.raises(AssertionError, match=rf"{rows[0].video}: {STYLE} is nan"):
        compare(rows, PRIMARIES, design())


def test_other_strengths_and_checkpoints_are_not_mixed_in():
    rows = both(shifted(style=0.2))
    others = clips("adapter", shifted(style=9.0), strength=0.5) + clips("step 200", shifted(style=-9.0))
    assert compared(rows + others) == compared(rows)


def test_pairs_are_found_by_prompt_and_seed_whatever_the_order():
    """What a prompt and a seed share cancels: shuffled clips must leave intervals narrow."""
    rows = both(shifted(style=0.2))
    shuffled = [rows[position] for position in np.random.default_rng(0).permutation(len(rows))]
    one = compared(shuffled)[STYLE, "trigger"]
    assert one.difference.high - one.difference.low < 0.01


def test_an_adapter_that_changes_nothing_is_no_worse_and_no_better():
    base = clips("base", LEVELS)
    same = [replace(row, adapter="adapter", strength=1.0) for row in base]
    found = compared(base + same)
    assert [found[name, "trigger"].conclusion for name in PRIMARIES] == ["unclear", "no worse", "no worse"]
    assert found[STYLE, "trigger"].difference == type(found[STYLE, "trigger"].difference)(0.0, 0.0, 0.0)
    assert found[STYLE, "trigger"].tally == Tally(0, 12, 0)
    assert found[STYLE, "trigger"].effect_size is None


def test_primaries_need_their_margins():
    with pytest.raises(AssertionError, match="needs a margin"):
        design(margins={ALIGN: 0.01})
    with pytest.raises(AssertionError, match="no measure of style"):
        design(primaries={"style": ALIGN})
