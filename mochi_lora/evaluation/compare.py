"""Adapter against base: one comparison per measure and prompt set, tested where that was agreed beforehand.

Style is a test of superiority (two-sided), a measure with a margin one of non-inferiority (one-sided). The primaries on
trigger prompts are adjusted by Holm; every other p-value stands as it is, for orientation.
"""

from collections.abc import Sequence
from dataclasses import replace

from mochi_lora.errors import UserError
from mochi_lora.evaluation.paired import BASE, Design, Paired, oriented, oriented_interval, pair, select
from mochi_lora.evaluation.results import Comparison, Conclusion, Interval, Missing, PromptSet, Row
from mochi_lora.evaluation.statistics import (
    ALPHA,
    bootstrap_interval,
    effect_size,
    holm,
    non_inferiority_p,
    prompts_needed,
    sign_flip_p,
    tally,
)
from mochi_lora.measures.catalogue import MEASURES

PROMPT_SETS: tuple[PromptSet, ...] = ("trigger", "plain", "unrelated")


def compare(
    rows: Sequence[Row], measures: Sequence[str], design: Design, adapter: str = "adapter"
) -> tuple[tuple[Comparison, ...], tuple[Missing, ...]]:
    """Compare the clips of `adapter` at strength 1 with the base's, on every prompt set that has any.

    Raises UserError for a clip that lacks its counterpart. Every primary should be among `measures`; one that could not be
    measured counts in Holm's adjustment as a test that failed, so that leaving it out gains nothing.
    """
    found: list[Comparison] = []
    missing: list[Missing] = []
    for prompt_set in PROMPT_SETS:
        ours, base = select(rows, prompt_set, adapter), select(rows, prompt_set, BASE)
        if not ours:
            continue
        _require_counterparts(base, ours, adapter)
        for measure in measures:
            paired = pair(base, ours, measure)
            missing += _gaps(measure, prompt_set, paired)
            if len(paired.prompts) > 1:
                found.append(_comparison(measure, prompt_set, paired, design))
        missing += _untestable([one for one in found if one.prompt_set == prompt_set], design)
    return tuple(_concluded(one, design) for one in _adjusted(found, design)), tuple(missing)


def _require_counterparts(base: Sequence[Row], ours: Sequence[Row], adapter: str) -> None:
    present = {(row.prompt, row.seed) for row in ours}
    for row in base:
        if (row.prompt, row.seed) not in present:
            message = f"{row.video}: {adapter!r} has no clip of prompt {row.prompt!r} with seed {row.seed}"
            raise UserError(f"{message}; base and adapter need the same prompts and seeds: make that one too")


def _gaps(measure: str, prompt_set: PromptSet, paired: Paired) -> list[Missing]:
    count = len(paired.prompts)
    everywhere = count + paired.left_out
    if count == 0:
        return [Missing(measure, f"no {prompt_set} prompt has a value for both base and adapter")]
    if count == 1:
        return [Missing(measure, f"there is one {prompt_set} prompt only, and one prompt has no interval: give more prompts")]
    if paired.left_out:
        return [Missing(measure, f"{paired.left_out} of {everywhere} {prompt_set} prompts lack it; the others are compared")]
    return []


def _comparison(measure: str, prompt_set: PromptSet, paired: Paired, design: Design) -> Comparison:
    """Everything but the adjustment and the conclusion."""
    return Comparison(
        measure=measure,
        prompt_set=prompt_set,
        primary=prompt_set == "trigger" and measure in design.primaries.values(),
        base=float(paired.base.mean()),
        adapter=float(paired.adapter.mean()),
        difference=bootstrap_interval(paired.differences, design.seed, design.resamples),
        prompts=len(paired.prompts),
        p_value=_p_value(measure, prompt_set, paired, design),
        p_adjusted=None,
        tally=tally(oriented(measure, paired.base), oriented(measure, paired.adapter)),
        effect_size=effect_size(paired.differences),
        margin=design.margins.get(measure),
        conclusion="indicative",
    )


def _is_tested(measure: str, design: Design) -> bool:
    return not design.quick and MEASURES[measure].better != "neither"


def _needed(measure: str, prompt_set: PromptSet, design: Design) -> int:
    """Prompts below which a test cannot succeed, whatever the clips look like."""
    primary = prompt_set == "trigger" and measure in design.primaries.values()
    return prompts_needed(len(design.primaries) if primary else 1, two_sided=measure not in design.margins)


def _p_value(measure: str, prompt_set: PromptSet, paired: Paired, design: Design) -> float | None:
    if not _is_tested(measure, design) or len(paired.prompts) < _needed(measure, prompt_set, design):
        return None
    better, margin = oriented(measure, paired.differences), design.margins.get(measure)
    if margin is not None:
        return non_inferiority_p(better, margin, design.seed)
    return sign_flip_p(better, "two-sided", design.seed)


def _untestable(comparisons: Sequence[Comparison], design: Design) -> list[Missing]:
    """One entry per prompt set that has too few prompts for some of its tests."""
    short = [one for one in comparisons if _is_tested(one.measure, design) and one.p_value is None]
    if not short:
        return []
    needed = max(_needed(one.measure, one.prompt_set, design) for one in short)
    fewest = min(one.prompts for one in short)
    reason = f"{fewest} prompts are too few: with fewer than {needed} no sign-flip test can reach {ALPHA}; give more prompts"
    return [Missing(f"tests on {short[0].prompt_set} prompts", reason)]


def _adjusted(comparisons: Sequence[Comparison], design: Design) -> list[Comparison]:
    family = [one.p_value for one in comparisons if one.primary and one.p_value is not None]
    padded = holm(family + [1.0] * (len(design.primaries) - len(family)))
    values = iter(padded)
    return [replace(one, p_adjusted=next(values)) if one.primary and one.p_value is not None else one for one in comparisons]


def _concluded(one: Comparison, design: Design) -> Comparison:
    if MEASURES[one.measure].better == "neither":
        return replace(one, conclusion="context")
    if not _is_tested(one.measure, design):
        return one
    p_value = one.p_adjusted if one.primary else one.p_value
    return replace(one, conclusion=_conclusion(oriented_interval(one.measure, one.difference), p_value, one.margin))


def _conclusion(better: Interval, p_value: float | None, margin: float | None) -> Conclusion:
    """`better` is oriented: larger is better."""
    if p_value is None:
        return "unclear"
    if p_value <= ALPHA:
        if margin is None:
            return "better" if better.value > 0 else "worse"
        # Superiority after non-inferiority costs no further adjustment (Morikawa & Yoshida 1995).
        return "better" if better.low > 0 else "no worse"
    return "worse" if margin is not None and better.high < 0 else "unclear"
