"""The words and number formats that the page and the Markdown share. Nothing is concluded here, only said."""

import math
from collections.abc import Sequence

from mochi_lora.evaluation.results import Comparison, Conclusion, Evaluation, Missing, PromptSet
from mochi_lora.measures.catalogue import MEASURES, Axis

QUESTIONS: dict[Axis, str] = {
    "style": "Did it learn the style?",
    "alignment": "Does it still do what the prompt says?",
    "quality": "Do the pictures hold up?",
}
SET_TITLES: dict[PromptSet, str] = {
    "trigger": "With the trigger word",
    "plain": "Same content, no trigger word",
    "unrelated": "Other content, no trigger word",
    "training": "Captions of training clips",
}
SET_MEANINGS: dict[PromptSet, str] = {
    "trigger": "Here the style is asked for, on content that was not in the training clips: the right side should show it.",
    "plain": "Here the style is not asked for: the nearer the right side is to the left, the better the trigger word works.",
    "unrelated": "Here neither the style nor its content is asked for: both sides should look alike.",
    "training": "Here a copy of a training clip is likeliest to show.",
}
_CONCLUSIONS: dict[Conclusion, tuple[str, str]] = {
    "better": ("Better", "by more than chance explains"),
    "no worse": ("No worse", "any loss is smaller than the loss allowed"),
    "worse": ("Worse", "by more than chance explains"),
    "unclear": ("Unclear", "these prompts cannot tell it from chance"),
    "indicative": ("Not tested", "read it as a hint"),
    "context": ("Context", "shown to be read beside the others, never judged"),
}
_TONES: dict[Conclusion, str] = {"better": "good", "no worse": "good", "worse": "bad"}
_UNITS = {"quality.motion_amount": "% of the short side per 1/8 s"}
_PARTS = {
    "memorisation": "Memorisation",
    "curve": "Checkpoints",
    "sweep": "Strength",
    "losses": "Prediction error",
    "bleed": "Style without the trigger word",
    "pairs": "Videos side by side",
    "comparisons": "All comparisons",
    "truth": "Drawn-world check",
}
UNADJUSTED = (
    "Only the three questions’ P are corrected for several tests. Every other P stands for itself: of twenty such tests, one "
    "falls below 0.05 by chance alone."
)
MINUS = "\N{MINUS SIGN}"


def number(value: float | None, decimals: int | None = None, *, signed: bool = False) -> str:
    """`value` for people: about three significant digits, or `decimals`; a real minus sign; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else MINUS + "\N{INFINITY}"
    places = _places(value) if decimals is None else decimals
    text = f"{abs(value):.{places}f}"
    if not float(text):
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text


def _places(value: float) -> int:
    size = abs(value)
    if size >= 100 or size == 0:
        return 0
    return min(6, max(0, 2 - math.floor(math.log10(size)))) if size >= 0.1 else min(6, 1 - math.floor(math.log10(size)))


def decimals(comparison: Comparison) -> int:
    """Decimals at which the interval of `comparison` has two digits, so that a row's numbers line up."""
    width = comparison.difference.high - comparison.difference.low
    size = width if math.isfinite(width) and width > 0 else abs(comparison.difference.value)
    return min(5, max(2, 1 - math.floor(math.log10(size)))) if size > 0 else 2


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage; below 10 % with one decimal unless it is whole."""
    if share is None or math.isnan(share):
        return "\N{EN DASH}"
    value = share * 100
    text = f"{abs(value):.0f}" if abs(value) >= 10 or value == round(value) else f"{abs(value):.1f}"
    return f"{MINUS if value < 0 and float(text) else ''}{text}\N{NO-BREAK SPACE}%"


def p_value(value: float) -> str:
    """`P = 0.012`, or `P < 0.001`."""
    text = "P < 0.001" if value < 0.001 else f"P = {value:.3f}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def label(name: str) -> str:
    """What people call a measure or a part of the report; a name nobody knows is itself."""
    return MEASURES[name].label if name in MEASURES else _PARTS.get(name, name)


def direction(name: str) -> str:
    """Which way is good, and the unit if there is one."""
    words = {"up": "higher is better", "down": "lower is better", "neither": "neither good nor bad"}[MEASURES[name].better]
    return f"{words}, in {_UNITS[name]}" if name in _UNITS else words


def conclusion(comparison: Comparison) -> tuple[str, str, str]:
    """(word, what it means, tone: good, bad or neutral)."""
    word, meaning = _CONCLUSIONS[comparison.conclusion]
    return word, meaning, _TONES.get(comparison.conclusion, "neutral")


def evidence(comparison: Comparison) -> str:
    """How firmly the conclusion stands, in one or two sentences."""
    count = f"{comparison.prompts} prompt{'' if comparison.prompts == 1 else 's'}"
    more, less = ("Larger", "smaller") if MEASURES[comparison.measure].better == "neither" else ("Better", "worse")
    tally = comparison.tally
    sentences = [f"{more} on {tally.better}, equal on {tally.equal}, {less} on {tally.worse} of {count}."]
    if comparison.margin is not None:
        sentences.append(f"Loss allowed: {comparison.margin:g}.")
    if comparison.p_adjusted is not None:
        sentences.append(f"{p_value(comparison.p_adjusted)}, corrected for several tests.")
    elif comparison.p_value is not None:
        sentences.append(f"{p_value(comparison.p_value)}.")
    return " ".join(sentences)


def outcome(evaluation: Evaluation) -> tuple[str, str]:
    """(word, tone) of the verdict; the headline says it in a sentence."""
    if evaluation.quick:
        return "indicative", "neutral"
    match evaluation.verdict.worked:
        case True:
            return "positive", "good"
        case False:
            return "negative", "bad"
    return "open", "neutral"


def gaps(missing: Sequence[Missing]) -> list[tuple[str, str]]:
    """(what, why) of what was not computed, those of one reason together; why has no full stop."""
    whats: dict[str, list[str]] = {}
    for gap in missing:
        whats.setdefault(gap.because.rstrip("."), []).append(label(gap.what))
    return [(", ".join(dict.fromkeys(names)), because) for because, names in whats.items()]


def substitutes(evaluation: Evaluation) -> str:
    """What small built-in networks measured, as a list; empty where nothing is shown that they did."""
    return ", ".join(label(name) for name in evaluation.incomparable)


def primaries(evaluation: Evaluation) -> list[tuple[Axis, str, Comparison | None, list[Missing]]]:
    """Per axis its question, its primary comparison if there is one, and else what of the axis is missing."""
    rows = []
    for axis, question in QUESTIONS.items():
        found = [row for row in evaluation.comparisons if row.primary and MEASURES[row.measure].axis == axis]
        gaps = [gap for gap in evaluation.missing if gap.what in MEASURES and MEASURES[gap.what].axis == axis]
        rows.append((axis, question, found[0] if found else None, gaps))
    return rows


def measures_to_plot(evaluation: Evaluation, points: Sequence[dict[str, float]]) -> list[str]:
    """One measure per axis that `points` have (the primary, else the catalogue's first), then content kept."""
    present = {name for values in points for name in values}
    chosen = []
    for axis in QUESTIONS:
        main = [row.measure for row in evaluation.comparisons if row.primary and MEASURES[row.measure].axis == axis]
        rest = [name for name, measure in MEASURES.items() if measure.axis == axis]
        chosen += [name for name in (*main, *rest) if name in present][:1]
    return chosen + [name for name in ("drift.content",) if name in present]
