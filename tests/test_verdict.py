"""From conclusions to words: each case changes the one thing that decides it."""

import re
from functools import partial
from typing import get_args

import pytest
from evaluation_rows import ALIGN, QUALITY, STYLE, design

from mochi_lora.config.schema import Config
from mochi_lora.evaluation.advice import _ADVICE, Finding, advise
from mochi_lora.evaluation.results import (
    BandLoss,
    Bleed,
    Comparison,
    Curve,
    Interval,
    Memorisation,
    Missing,
    StrengthPoint,
    Sweep,
    Tally,
    Verdict,
)
from mochi_lora.evaluation.verdict import give_verdict

MOTION = "quality.motion_amount"
CHANGE = {"better": 0.2, "worse": -0.2, "no worse": 0.001, "unclear": 0.001, "indicative": 0.2}


def comparison(measure: str, conclusion: str, *, base: float = 0.5, change: float | None = None, **fields) -> Comparison:
    primary = measure in (STYLE, ALIGN, QUALITY)
    change = CHANGE[conclusion] if change is None else change
    values = {
        "prompt_set": "trigger",
        "primary": primary,
        "base": base,
        "adapter": base + change,
        "difference": Interval(change, change - 0.05, change + 0.05),
        "prompts": 30,
        "p_value": None if conclusion == "indicative" else 0.01,
        "p_adjusted": None if conclusion == "indicative" else 0.03,
        "tally": Tally(24, 0, 6),
        "effect_size": 1.0,
        "margin": 0.01 if measure in (ALIGN, QUALITY) else None,
        "conclusion": conclusion,
    }
    return Comparison(measure, **values | fields)


def three(style: str = "better", alignment: str = "no worse", quality: str = "no worse", **fields) -> list[Comparison]:
    pairs = zip((STYLE, ALIGN, QUALITY), (style, alignment, quality), strict=True)
    return [comparison(measure, conclusion, **fields) for measure, conclusion in pairs]


def memorisation(conclusion: str) -> Memorisation:
    return Memorisation(0.6 if conclusion == "memorises" else 0.02, 0.01, 0.8, "99th percentile", (), None, conclusion)


def verdict(comparisons=None, *, bleed=(), copies=None, sweep=None, curve=None, missing=(), quick=False) -> Verdict:
    found = three() if comparisons is None else comparisons
    return give_verdict(found, bleed, copies, sweep, curve, missing, design(quick=quick))


DIVERSITY = comparison("diversity", "indicative", change=-0.2)  # 60 % of the base's
STILL = [comparison(MOTION, "indicative", base=4.0, change=-3.0), comparison("quality.motion_smoothness", "better")]

CASES = {
    "plain success": (partial(verdict), True, r"^It worked", None, "Nothing needs changing"),
    "alignment lost": (
        partial(verdict, three(alignment="worse")),
        False,
        r"stopped listening.*follow their prompts less",
        None,
        "sample.strength",
    ),
    "quality lost": (
        partial(verdict, three(quality="worse")),
        False,
        r"^It learned the style, but.*hold together less",
        None,
        "train.learning_rate",
    ),
    "both lost": (
        partial(verdict, three(alignment="worse", quality="worse")),
        False,
        r"stopped listening.*prompts and hold together less",
        None,
        "data.clips",
    ),
    "no style": (
        partial(verdict, three(style="unclear")),
        False,
        r"^It did not learn the style: over 30 prompts",
        None,
        "Raise train.steps",
    ),
    "no style and alignment lost": (
        partial(verdict, three(style="unclear", alignment="worse")),
        False,
        r"did not learn.*and its videos follow",
        None,
        "Raise train.steps",
    ),
    "away from the style": (partial(verdict, three(style="worse")), False, r"references less", None, "references"),
    "alignment open": (
        partial(verdict, three(alignment="unclear")),
        None,
        r"whether its videos follow their prompts as well.*not be shown",
        "0.01 or more",
        "more prompts",
    ),
    "both open": (
        partial(verdict, three(alignment="unclear", quality="unclear")),
        None,
        r"follow their prompts and hold together",
        "0.01 or more",
        "more prompts",
    ),
    "too few prompts": (
        partial(
            verdict,
            three("unclear", "unclear", "unclear", p_value=None, prompts=4),
            missing=[Missing("tests on trigger prompts", "4 prompts are too few")],
        ),
        None,
        r"cannot be said.*4 prompts are too few",
        "There are no tests on trigger prompts: 4 prompts",
        "more prompts",
    ),
    "memorises": (
        partial(verdict, copies=memorisation("memorises")),
        False,
        r"^Warning: it replays.*60% of its videos on their captions.*base model: 1%",
        None,
        "more varied, clips (data.clips)",
    ),
    "does not memorise": (
        partial(verdict, copies=memorisation("does not memorise")),
        True,
        r"^It worked",
        "No sign that it replays",
        "Nothing",
    ),
    "leaks": (
        partial(verdict, bleed=[Bleed("unrelated", Interval(0.5, 0.3, 0.7), 0.8)]),
        True,
        r"^It worked.*But the style leaks",
        "unrelated prompts without the trigger, 50%",
        "objective.caption_dropout",
    ),
    "trigger does nothing": (
        partial(verdict, bleed=[Bleed("plain", Interval(0.9, 0.8, 1.0), 0.8)]),
        True,
        r"But the style leaks",
        "same prompts without the trigger, 90%",
        "adapter.targets",
    ),
    "leaks little": (
        partial(verdict, bleed=[Bleed("unrelated", Interval(0.15, 0.1, 0.2), 0.8)]),
        True,
        r"base model's\.$",
        "15% of the style",
        "Nothing",
    ),
    "may leak or not": (
        partial(verdict, bleed=[Bleed("unrelated", Interval(0.3, -0.1, 0.7), 0.8)]),
        True,
        r"base model's\.$",
        "30% of the style",
        "Nothing",
    ),
    "frozen": (
        partial(verdict, [*three(quality="better"), *STILL]),
        False,
        r"learned the style, but its clips have nearly stopped",
        "and motion smoothness is that of a frozen clip",
        "clips that move",
    ),
    "frozen without style": (
        partial(verdict, [*three(style="unclear"), STILL[0]]),
        False,
        r"^Its clips have nearly stopped",
        "fell from 4 to 1",
        "clips that move",
    ),
    "less motion": (
        partial(verdict, [*three(), comparison(MOTION, "indicative", base=4.0, change=-1.0)]),
        True,
        r"^It worked",
        None,
        "Nothing",
    ),
    "less motion by chance": (
        partial(
            verdict, [*three(), comparison(MOTION, "indicative", base=4.0, change=-3.0, difference=Interval(-3.0, -8.0, 2.0))]
        ),
        True,
        r"^It worked",
        None,
        "Nothing",
    ),
    "alike": (partial(verdict, [*three(), DIVERSITY]), True, r"^It worked", "diversity is 60%", "more varied clips"),
    "quick": (
        partial(verdict, three("indicative", "indicative", "indicative"), quick=True),
        None,
        r"^Indicative only.*30 prompts: style looks better; alignment looks better",
        "not tested",
        "without --quick",
    ),
    "quick, style not seen": (
        partial(verdict, [comparison(STYLE, "indicative", change=0.01), *three()[1:]], quick=True),
        None,
        r"style looks about the same",
        None,
        "--quick",
    ),
    "quick and memorises": (
        partial(verdict, three("indicative", "indicative", "indicative"), copies=memorisation("memorises"), quick=True),
        False,
        r"^Warning",
        "not tested",
        "more varied",
    ),
    "style not measured": (
        partial(verdict, three()[1:], missing=[Missing("style.gram", "of another"), Missing(STYLE, "no references are there")]),
        None,
        r"cannot be said.*style was not measured, because no references are there\.",
        "Style: not measured",
        "Mend",
    ),
    "nothing measured": (
        partial(verdict, []),
        None,
        r"cannot be said.*style was not measured",
        "Quality: not measured",
        "Mend",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_says_what_decided_it(case):
    give, worked, headline, reason, advice = CASES[case]
    given = give()
    assert given.worked is worked
    assert re.search(headline, given.headline), given.headline
    assert reason is None or any(reason in one for one in given.reasons), given.reasons
    assert any(advice in one for one in given.advice), given.advice
    assert [one.split(":")[0] for one in given.reasons[:3]] == ["Style", "Alignment", "Quality"]


def test_a_dissimilarity_that_fell_looks_better():
    falling = comparison("style.distance", "indicative", change=-0.2, primary=True)
    assert "style looks better" in verdict([falling, *three()[1:]], quick=True).headline


def test_other_prompt_sets_do_not_carry_the_verdict():
    lost = comparison(ALIGN, "worse", prompt_set="unrelated", primary=False)
    assert verdict([*three(), lost]).worked is True


def test_why_an_axis_is_open_is_told_of_its_own_measure_and_of_no_other():
    gaps = [Missing("quality.warp_error", "2 of 8 clips have fewer than three frames"), Missing(QUALITY, "it is not installed")]
    given = verdict(three()[:2], missing=gaps)
    assert given.headline == "It cannot be said whether it worked: quality was not measured, because it is not installed."
    assert "Quality: not measured, because it is not installed." in given.reasons
    unknown = verdict(three()[:2], missing=gaps[:1])
    assert "because its primary measure has no value for both base and adapter" in unknown.headline


def test_free_advice_comes_before_training_again_and_warnings_before_both():
    sweep = Sweep((StrengthPoint(0.0, {}),), 1.0, 0.75)
    curve = Curve((), "adapters/400.safetensors", "step 400 has the most style")
    given = verdict(three(alignment="worse"), sweep=sweep, curve=curve, copies=memorisation("memorises"))
    starts = [one.split(" ")[0:2] for one in given.advice]
    positions = [
        starts.index(start.split(" "))
        for start in ("Train on", "Keep adapters/400.safetensors:", "Try sample.strength", "Lower sample.strength:")
    ]
    assert positions == sorted(positions)


def test_no_recommendation_and_no_knee_are_no_advice():
    given = verdict(sweep=Sweep((), None, None), curve=Curve((), None, "nothing is admissible"))
    assert given == verdict()


def test_advice_is_given_once():
    given = verdict(bleed=[Bleed(name, Interval(0.5, 0.3, 0.7), 0.8) for name in ("plain", "unrelated")])
    assert len(set(given.advice)) == len(given.advice)


def test_every_finding_has_advice_and_every_setting_named_there_exists():
    assert set(get_args(Finding)) == set(_ADVICE)
    text = " ".join(advise(list(_ADVICE), Sweep((), None, 0.5), None))
    named = re.findall(r"\b(data|adapter|objective|train|sample)\.([a-z_]+)", text)
    assert len(named) > 8
    for section, setting in named:
        assert setting in Config.model_fields[section].annotation.model_fields, f"{section}.{setting}"


def test_sentences_are_whole():
    for give, *_ in CASES.values():
        given = give()
        for sentence in (given.headline, *given.reasons, *given.advice):
            assert sentence[0].isupper()
            assert sentence.endswith(".")
            assert ".." not in sentence
            assert "None" not in sentence
            assert "nan" not in sentence


@pytest.mark.parametrize(
    ("held_out", "training", "overfit"),
    [((0.1, 0.05, 0.2), -0.1, True), ((0.1, -0.05, 0.2), -0.1, False), ((0.1, 0.05, 0.2), 0.1, False)],
)
def test_error_that_rises_on_unseen_clips_while_it_falls_on_its_own_is_overfitting(held_out, training, overfit):
    level, change = Interval(1.0, 0.9, 1.1), Interval(training, training - 0.05, training + 0.05)
    bands = [BandLoss(sigma, level, level, level, level, Interval(*held_out), change) for sigma in (0.25, 0.75)]
    found = give_verdict(three(), (), None, None, None, (), design(), losses=bands)
    assert any("Overfitted" in reason for reason in found.reasons) == overfit
    assert any("adapters/best.safetensors" in advice for advice in found.advice) == overfit
