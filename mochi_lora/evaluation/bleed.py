"""Style where nobody asked for it: its change on prompts without the trigger, as a share of the change with it."""

from collections.abc import Sequence

import numpy as np

from mochi_lora.evaluation.paired import BASE, DRIFT, Design, Paired, oriented, pair, select
from mochi_lora.evaluation.results import Bleed, Missing, PromptSet, Row
from mochi_lora.evaluation.statistics import bootstrap_interval, ratio_interval

# Stricter than the 95 % of every other interval: a ratio is only as steady as its denominator.
_CERTAINTY = 0.99
_FEWEST = 5  # prompts of either set


def bleed(rows: Sequence[Row], design: Design, adapter: str = "adapter") -> tuple[tuple[Bleed, ...], tuple[Missing, ...]]:
    """Bleed on plain and on unrelated prompts, by the style primary, of `adapter` at strength 1.

    Where the change on trigger prompts is not clearly above zero there is no bleed to speak of, hence `Missing`: a division
    by almost nothing would print an arbitrary number.
    """
    style = design.primaries.get("style")
    if style is None:
        return (), (Missing("bleed", "no measure of style was agreed on"),)
    triggered = _changes(rows, "trigger", style, adapter)
    if reason := _unusable(triggered, design, style):
        return (), (Missing("bleed", reason),)
    found, missing = [], []
    for prompt_set in ("plain", "unrelated"):
        changes = _changes(rows, prompt_set, style, adapter)
        if len(changes.prompts) < _FEWEST:
            count = len(changes.prompts)
            missing.append(Missing("bleed", f"{count} {prompt_set} prompts have a style value, and {_FEWEST} are needed"))
            continue
        above, below = (oriented(style, side.differences) for side in (changes, triggered))
        ratio = ratio_interval(above, below, design.seed, design.resamples)
        found.append(Bleed(prompt_set, ratio, _drift(rows, prompt_set, adapter)))
    return tuple(found), tuple(missing)


def _changes(rows: Sequence[Row], prompt_set: PromptSet, measure: str, adapter: str) -> Paired:
    return pair(select(rows, prompt_set, BASE), select(rows, prompt_set, adapter), measure)


def _unusable(triggered: Paired, design: Design, style: str) -> str | None:
    count = len(triggered.prompts)
    if count < _FEWEST:
        return f"{count} trigger prompts have a style value, and {_FEWEST} are needed"
    change = oriented(style, triggered.differences)
    if bootstrap_interval(change, design.seed, design.resamples, _CERTAINTY).low > 0:
        return None
    return "the style does not clearly change with the trigger, so there is nothing to compare the other prompts with"


def _drift(rows: Sequence[Row], prompt_set: PromptSet, adapter: str) -> float | None:
    values = _changes(rows, prompt_set, DRIFT, adapter).adapter
    return float(np.mean(values)) if len(values) else None
