"""One plain sentence per part of an evaluation: the titles of its plots. They repeat the numbers and conclude nothing new."""

import math
from collections.abc import Sequence

from mochi_lora.evaluation.results import BandLoss, Bleed, Curve, Interval, Memorisation, SetDistance, Sweep
from mochi_lora.report.wording import number, p_value, percent

_CHANCE = 0.05
_TOGETHER = 0.8  # rank correlation from which "more strength, more style" is a fair title


def sweep_finding(sweep: Sweep) -> str:
    """What the strengths show."""
    if sweep.knee is not None:
        return f"Beyond strength {number(sweep.knee, 2)}, style hardly grows while the rest suffers"
    if sweep.spearman is None:
        return "Style, alignment and content at each strength"
    return "More strength, more style" if sweep.spearman >= _TOGETHER else "More strength does not reliably mean more style"


def curve_finding(curve: Curve) -> str:
    """Which checkpoint to keep."""
    if curve.recommended is None:
        return "No checkpoint can be recommended"
    kept = [point for point in curve.points if point.adapter == curve.recommended]
    return f"Keep step {kept[0].step}" if kept else "Keep the recommended checkpoint"


def losses_finding(losses: Sequence[BandLoss]) -> str:
    """How the mean error changed on clips never seen and on training clips."""
    held_out = _change([row.base_held_out for row in losses], [row.adapter_held_out for row in losses])
    training = _change([row.base_training for row in losses], [row.adapter_training for row in losses])
    return f"Error against the base: {held_out} on clips it never saw, {training} on its training clips"


def _change(before: Sequence[Interval], after: Sequence[Interval]) -> str:
    first, second = (sum(part.value for part in parts) for parts in (before, after))
    if not (math.isfinite(first) and math.isfinite(second) and first > 0):
        return "not known"
    change = second / first - 1
    if abs(change) < 0.001:
        return "unchanged"
    return f"{percent(abs(change))} {'lower' if change < 0 else 'higher'}"


def memorisation_finding(found: Memorisation) -> str:
    """How many clips are too near to a training clip."""
    start = "It copies training clips" if found.conclusion == "memorises" else "No sign of copying"
    mine, base = percent(found.flagged_share), percent(found.base_flagged_share)
    return f"{start}: {mine} of the adapter’s clips are suspiciously near to a training clip, {base} of the base model’s"


def bleed_finding(bleed: Bleed) -> str:
    """How much of the style comes unasked."""
    where = {
        "trigger": "on trigger prompts",
        "plain": "on the same content without the trigger word",
        "unrelated": "on other content",
    }[bleed.prompt_set]
    return f"{percent(bleed.ratio.value)} of the style comes unasked {where}"


def distance_finding(found: SetDistance) -> str:
    """How far both sides, each as one set of clips, are from the references."""
    nearer = "nearer than the base’s" if found.adapter < found.base else "no nearer than the base’s"
    values = f"distance {number(found.adapter)} with the adapter, {number(found.base)} without, 0 is none"
    if found.adapter_p is None or found.base_p is None:
        return f"Against all references, the adapter’s clips together are {nearer} ({values})"
    alike = " and not told apart from them" if found.adapter_p > _CHANCE else ""
    chance = f"that there is none: {p_value(found.adapter_p)} with, {p_value(found.base_p)} without"
    return f"Against all references, the adapter’s clips together are {nearer}{alike} ({values}; {chance})"


def strength_zero_finding(*, is_base: bool) -> str:
    """Whether the adapter at strength 0 is the base."""
    if is_base:
        return "At strength 0 the adapter makes the base model’s video, bit for bit: nothing but the adapter differs"
    return "At strength 0 the adapter does not make the base model’s video: more than the adapter differs, trust nothing here"
