"""From conclusions to plain words: did it work, why, and what to try next."""

from collections.abc import Sequence
from dataclasses import dataclass

from mochi_lora.evaluation.advice import Finding, advise
from mochi_lora.evaluation.paired import Design, PrimaryAxis, oriented_interval
from mochi_lora.evaluation.results import BandLoss, Bleed, Comparison, Curve, Memorisation, Missing, Sweep, Verdict
from mochi_lora.measures.catalogue import MEASURES

FROZEN_BELOW = 0.5  # of the base's motion amount
UNIFORM_BELOW = 0.7  # of the base's diversity
LEAK_ABOVE = 0.2  # of the style's change with the trigger

_AXES: tuple[PrimaryAxis, ...] = ("style", "alignment", "quality")
_KEPT = ("better", "no worse")
_REWARD_STILLNESS = ("quality.subject_consistency", "quality.background_consistency", "quality.motion_smoothness")
# Which of its videos were searched for training clips.
_SEARCHED = {"training": "on their captions", "trigger": "on the trigger prompts"}
# What each axis is called in a sentence about not losing it.
_ABILITY = {"alignment": "follow their prompts", "quality": "hold together"}


@dataclass(frozen=True)
class _Evidence:
    """What the sentences draw on, looked up once."""

    primaries: dict[PrimaryAxis, Comparison]
    others: dict[str, Comparison]  # on trigger prompts
    findings: frozenset[Finding]
    memorisation: Memorisation | None
    bleed: Sequence[Bleed]
    missing: Sequence[Missing]
    design: Design


def give_verdict(
    comparisons: Sequence[Comparison],
    bleed: Sequence[Bleed],
    memorisation: Memorisation | None,
    sweep: Sweep | None,
    curve: Curve | None,
    missing: Sequence[Missing],
    design: Design,
    *,
    losses: Sequence[BandLoss] = (),
) -> Verdict:
    """The verdict rests on the three primaries on trigger prompts; everything else warns or advises.

    `worked` is None when a primary was not measured, when nothing was tested, or when a test that did not succeed leaves it
    open; it is False for an adapter that replays its training clips or stops them moving, whatever its style.
    """
    on_trigger = {one.measure: one for one in comparisons if one.prompt_set == "trigger"}
    carrying = [one for one in on_trigger.values() if one.primary]
    primaries = {axis: one for axis in _AXES for one in carrying if MEASURES[one.measure].axis == axis}
    findings = _findings(primaries, on_trigger, bleed, memorisation, quick=design.quick)
    if _is_overfit(losses):
        findings |= {"overfit"}
    evidence = _Evidence(primaries, on_trigger, findings, memorisation, bleed, missing, design)
    headline, worked = _headline(evidence)
    return Verdict(headline, worked, tuple(_reasons(evidence)), advise(findings, sweep, curve))


def _findings(
    primaries: dict[PrimaryAxis, Comparison],
    on_trigger: dict[str, Comparison],
    bleed: Sequence[Bleed],
    memorisation: Memorisation | None,
    *,
    quick: bool,
) -> frozenset[Finding]:
    leaking = {one.prompt_set for one in bleed if one.ratio.value > LEAK_ABOVE and one.ratio.low > 0}
    style, alignment, quality = (primaries.get(axis) for axis in _AXES)
    open_tests = [one for one in primaries.values() if one.conclusion == "unclear" and (one.margin or one.p_value is None)]
    holds: dict[Finding, bool] = {
        "quick": quick,
        "memorises": memorisation is not None and memorisation.conclusion == "memorises",
        "frozen": _is_frozen(on_trigger),
        "uniform": _has_fallen(on_trigger.get("diversity"), UNIFORM_BELOW),
        "no style": style is not None and style.conclusion == "unclear" and style.p_value is not None,
        "style away": style is not None and style.conclusion == "worse",
        "alignment worse": alignment is not None and alignment.conclusion == "worse",
        "quality worse": quality is not None and quality.conclusion == "worse",
        "open": bool(open_tests),
        "not measured": len(primaries) < len(_AXES),
        "leaks": "unrelated" in leaking,
        "trigger idle": "plain" in leaking,
    }
    return frozenset(finding for finding, does_hold in holds.items() if does_hold)


def _is_overfit(losses: Sequence[BandLoss]) -> bool:
    """On clips it never saw the error rose beyond chance at half of the noise levels or more, while on its own it fell."""
    changes = [(one.change_held_out, one.change_training) for one in losses]
    known = [(held_out, training) for held_out, training in changes if held_out is not None and training is not None]
    risen = [held_out for held_out, _ in known if held_out.low > 0]
    return bool(risen) and 2 * len(risen) >= len(known) and sum(training.value for _, training in known) < 0


def _has_fallen(one: Comparison | None, share: float) -> bool:
    """Below `share` of the base's, and not by chance."""
    return one is not None and one.adapter < share * one.base and one.difference.high < 0


def _is_frozen(on_trigger: dict[str, Comparison]) -> bool:
    return _has_fallen(on_trigger.get("quality.motion_amount"), FROZEN_BELOW)


def _headline(evidence: _Evidence) -> tuple[str, bool | None]:
    """The sentence, and whether it worked. The gravest comes first."""
    findings, primaries = evidence.findings, evidence.primaries
    if "memorises" in findings and evidence.memorisation is not None:
        share, base = evidence.memorisation.flagged_share, evidence.memorisation.base_flagged_share
        videos = _SEARCHED[evidence.memorisation.prompt_set]
        replays = f"it replays its training clips in {share:.0%} of its videos {videos} (the base model: {base:.0%})"
        return f"Warning: {replays}, so what it shows is not evidence of a learnt style.", False
    if "not measured" in findings:
        axis = next(axis for axis in _AXES if axis not in primaries)
        return f"It cannot be said whether it worked: {axis} was not measured, because {_why_missing(evidence, axis)}.", None
    if evidence.design.quick:
        tendencies = "; ".join(f"{axis} {_tendency(primaries[axis])}" for axis in _AXES)
        return f"Indicative only, nothing was tested on these {primaries['style'].prompts} prompts: {tendencies}.", None
    if "frozen" in findings:
        learnt = "It learned the style, but its" if primaries["style"].conclusion == "better" else "Its"
        return f"{learnt} clips have nearly stopped moving.", False
    if primaries["style"].conclusion != "better":
        return _without_style(evidence)
    return _with_style(evidence)


def _why_missing(evidence: _Evidence, axis: PrimaryAxis) -> str:
    reasons = [one.because for one in evidence.missing if one.what == evidence.design.primaries[axis]]
    return reasons[0] if reasons else "its primary measure has no value for both base and adapter"


def _tendency(one: Comparison) -> str:
    interval = oriented_interval(one.measure, one.difference)
    if interval.low > 0:
        return "looks better"
    return "looks worse" if interval.high < 0 else "looks about the same"


def _without_style(evidence: _Evidence) -> tuple[str, bool | None]:
    style = evidence.primaries["style"]
    if style.p_value is None:
        return f"It cannot be said whether it worked: {style.prompts} prompts are too few to test.", None
    lost = [axis for axis in ("alignment", "quality") if f"{axis} worse" in evidence.findings]
    also = f", and its videos {_less_well(lost)}" if lost else ""
    if "style away" in evidence.findings:
        return f"It did not learn the style: its videos resemble the references less than the base model's do{also}.", False
    return f"It did not learn the style: over {style.prompts} prompts no change beyond chance was found{also}.", False


def _with_style(evidence: _Evidence) -> tuple[str, bool | None]:
    conclusions = {axis: evidence.primaries[axis].conclusion for axis in ("alignment", "quality")}
    lost = [axis for axis, conclusion in conclusions.items() if conclusion == "worse"]
    unshown = [axis for axis, conclusion in conclusions.items() if conclusion not in (*_KEPT, "worse")]
    if "alignment" in lost:
        return f"It learned the style but stopped listening: its videos {_less_well(lost)}.", False
    if lost:
        return f"It learned the style, but its videos {_less_well(lost)}.", False
    if unshown:
        ability = " and ".join(_ABILITY[axis] for axis in unshown)
        return f"It learned the style; whether its videos {ability} as well as the base model's could not be shown.", None
    leaks = [finding for finding in ("leaks", "trigger idle") if finding in evidence.findings]
    but = " But the style leaks: it shows without the trigger too." if leaks else ""
    kept = " and ".join(_ABILITY.values())
    return f"It worked: it learned the style, and its videos {kept} as well as the base model's.{but}", True


def _less_well(axes: Sequence[str]) -> str:
    return f"{' and '.join(_ABILITY[axis] for axis in axes)} less well than the base model's"


def _reasons(evidence: _Evidence) -> list[str]:
    """One sentence per axis, then warnings, then what keeps the tests from saying more."""
    reasons = [_axis_sentence(axis, evidence) for axis in _AXES]
    others = evidence.others
    if "frozen" in evidence.findings:
        motion = others["quality.motion_amount"]
        reasons.append(f"Motion amount fell from {_number(motion.base)} to {_number(motion.adapter)}: the clips nearly froze.")
        gained = [name for name in _REWARD_STILLNESS if name in others and others[name].difference.low > 0]
        if gained:
            names = " and ".join(MEASURES[name].label.lower() for name in gained)
            reasons.append(f"The gain in {names} is that of a frozen clip, not of a better one.")
    if evidence.memorisation is not None and "memorises" not in evidence.findings:
        share, videos = evidence.memorisation.flagged_share, _SEARCHED[evidence.memorisation.prompt_set]
        near = f"{share:.0%} of its videos {videos} are suspiciously near to one"
        reasons.append(f"No sign that it replays its training clips: {near}.")
    for one in evidence.bleed:
        where = "the same prompts without the trigger" if one.prompt_set == "plain" else "unrelated prompts without the trigger"
        value, low, high = (round(part, 2) + 0.0 for part in (one.ratio.value, one.ratio.low, one.ratio.high))  # no -0 %
        span = f"95 % interval {low:.0%} to {high:.0%}"
        reasons.append(f"On {where}, {value:.0%} of the style's change shows up as well ({span}).")
    if "overfit" in evidence.findings:
        reasons.append("Overfitted: it predicts clips it never saw worse than the base model, and its training clips better.")
    if "uniform" in evidence.findings:
        share = others["diversity"].adapter / others["diversity"].base
        reasons.append(f"Different seeds give more alike videos: diversity is {share:.0%} of the base model's.")
    return reasons + [f"There are no {one.what}: {one.because}." for one in evidence.missing if one.what.startswith("tests on")]


def _axis_sentence(axis: PrimaryAxis, evidence: _Evidence) -> str:
    one = evidence.primaries.get(axis)
    if one is None:
        return f"{axis.capitalize()}: not measured, because {_why_missing(evidence, axis)}."
    values = f"{MEASURES[one.measure].label} {_number(one.base)} for the base model, {_number(one.adapter)} with the adapter"
    difference = one.difference
    span = f"difference {_number(difference.value)}, 95 % interval {_number(difference.low)} to {_number(difference.high)}"
    return f"{axis.capitalize()}: {_words(one)}. {values} ({span}, {one.prompts} prompts)."


def _words(one: Comparison) -> str:
    if one.conclusion == "no worse":
        return f"no worse, or worse by less than the agreed margin of {one.margin:g}"
    if one.conclusion == "indicative":
        return f"{_tendency(one)}, not tested"
    if one.conclusion != "unclear":
        return one.conclusion
    if one.p_value is None:
        return "too few prompts to test"
    return "no change beyond chance" if one.margin is None else f"a loss of {one.margin:g} or more could not be ruled out"


def _number(value: float) -> str:
    return f"{value:.3g}"
