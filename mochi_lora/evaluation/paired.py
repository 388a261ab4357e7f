"""Which numbers are set against which: clips of the adapter and of the base at the same prompt and seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mochi_lora.errors import UserError
from mochi_lora.evaluation.results import Interval, PromptSet, Row
from mochi_lora.evaluation.statistics import RESAMPLES, paired_differences
from mochi_lora.measures.catalogue import MEASURES

BASE = "base"  # Row.adapter of the base model's clips
DRIFT = "drift.content"
PrimaryAxis = Literal["style", "alignment", "quality"]


@dataclass(frozen=True)
class Design:
    """What was fixed before anything was measured."""

    primaries: Mapping[PrimaryAxis, str]  # the one measure per axis that carries the verdict
    margins: Mapping[str, float]  # of non-inferiority: measure -> positive number in its unit
    seed: int = 0
    resamples: int = RESAMPLES
    quick: bool = False  # nothing is tested

    def __post_init__(self) -> None:
        for axis, measure in self.primaries.items():
            assert MEASURES[measure].axis == axis, f"{measure} is no measure of {axis}"
            assert axis == "style" or measure in self.margins, f"{measure} is primary and needs a margin"
        assert all(margin > 0 for margin in self.margins.values()), f"margins are positive: {dict(self.margins)}"


@dataclass(frozen=True)
class Paired:
    """One measure on one prompt set: means over seeds, one entry per prompt."""

    prompts: tuple[str, ...]
    base: np.ndarray  # float64 [prompts]
    adapter: np.ndarray
    differences: np.ndarray  # adapter - base, in the measure's unit
    left_out: int = field(default=0)  # prompts without a value on both sides


def select(rows: Iterable[Row], prompt_set: PromptSet, adapter: str, strength: float = 1.0) -> list[Row]:
    """The clips of one adapter at one strength on one prompt set; the base's have no strength to choose."""
    return [
        row
        for row in rows
        if row.prompt_set == prompt_set and row.adapter == adapter and (adapter == BASE or row.strength == strength)
    ]


def pair(base: Sequence[Row], adapter: Sequence[Row], measure: str) -> Paired:
    """Match `adapter` with `base` by prompt and seed; the base may have clips beyond those.

    Raises UserError for a clip of the adapter whose counterpart is not there. The base's `drift.content` is 1 by
    definition: its clips have not drifted from themselves.
    """
    counterparts = {(row.prompt, row.seed): row for row in base}
    assert len(counterparts) == len(base), "a clip of the base is listed twice"
    assert len({(row.prompt, row.seed) for row in adapter}) == len(adapter), "a clip of the adapter is listed twice"
    sides: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    for row in adapter:
        counterpart = counterparts.get((row.prompt, row.seed))
        if counterpart is None:
            message = f"{row.video}: no clip of the base has prompt {row.prompt!r} and seed {row.seed}"
            raise UserError(f"{message}; every clip of the adapter is compared with the base's: make that one too")
        values = (1.0 if measure == DRIFT else _value(counterpart, measure)), _value(row, measure)
        if values[0] is not None and values[1] is not None:
            sides[0].setdefault(row.prompt, []).append(values[0])
            sides[1].setdefault(row.prompt, []).append(values[1])
    means = [np.array([np.mean(values) for values in side.values()], dtype=np.float64) for side in sides]
    left_out = len({row.prompt for row in adapter}) - len(sides[0])
    return Paired(tuple(sides[0]), means[0], means[1], paired_differences(*sides), left_out)


def _value(row: Row, measure: str) -> float | None:
    value = row.values.get(measure)
    assert value is None or math.isfinite(value), f"{row.video}: {measure} is {value}; what was not computed is left out"
    return value


def oriented(measure: str, values: np.ndarray) -> np.ndarray:
    """Values or differences so that larger is better; unchanged for measures that are neither."""
    return -values if MEASURES[measure].better == "down" else values


def oriented_interval(measure: str, interval: Interval) -> Interval:
    """The same for an interval."""
    if MEASURES[measure].better != "down":
        return interval
    return Interval(-interval.value, -interval.high, -interval.low)
