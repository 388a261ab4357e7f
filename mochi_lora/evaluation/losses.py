"""Held-out velocity loss by noise level: base and adapter, clips it was trained on and clips it never saw."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np

from mochi_lora.evaluation.footage import Share, alone
from mochi_lora.evaluation.results import BandLoss, Interval, Missing
from mochi_lora.evaluation.statistics import RESAMPLES, bootstrap_interval
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.training.batches import SampleSource
from mochi_lora.training.heldout import band_sigmas, clip_losses


@dataclass(frozen=True)
class Sides:
    """Losses of one model, float64 [clips, bands]."""

    held_out: np.ndarray
    training: np.ndarray


def band_losses(
    model: VelocityModel,
    held_out: SampleSource,
    training: SampleSource,
    bands: int,
    without_adapter: Callable[[], AbstractContextManager[None]],
    resamples: int = RESAMPLES,
    on_clip: Callable[[], None] = lambda: None,
    share: Share = alone,
) -> tuple[BandLoss, ...] | Missing:
    """Losses at the middles of `bands` equal parts of (0, 1), with 95 % bootstrap intervals over clips.

    `model` is measured as it stands, and again inside `without_adapter`, on the same clips with the same noise; `on_clip` is
    called after each of the 2 * (held out + training) measurements that `share` leaves to this process. Choose fewer entries
    of `training` for speed. Missing when either source has fewer than two clips.
    """
    for name, source in (("held-out", held_out), ("training", training)):
        if (count := len(source.entries)) < 2:
            because = f"an interval over clips needs two, and the number of {name} clips is {count}"
            return Missing("losses", f"{because}; see data.validation_fraction")

    def measured() -> Sides:
        return Sides(_table(model, held_out, bands, on_clip, share), _table(model, training, bands, on_clip, share))

    adapter = measured()
    with without_adapter():
        base = measured()
    return from_tables(base, adapter, held_out.seed, resamples)


def from_tables(base: Sides, adapter: Sides, seed: int, resamples: int = RESAMPLES) -> tuple[BandLoss, ...]:
    """Intervals over clips from tables of losses [clips, bands]."""

    def interval(table: np.ndarray, band: int) -> Interval:
        return bootstrap_interval(table[:, band], seed, resamples)

    return tuple(
        BandLoss(
            sigma=sigma,
            base_held_out=interval(base.held_out, band),
            adapter_held_out=interval(adapter.held_out, band),
            base_training=interval(base.training, band),
            adapter_training=interval(adapter.training, band),
            change_held_out=interval(adapter.held_out - base.held_out, band),
            change_training=interval(adapter.training - base.training, band),
        )
        for band, sigma in enumerate(band_sigmas(base.held_out.shape[1]))
    )


def _table(model: VelocityModel, source: SampleSource, bands: int, on_clip: Callable[[], None], share: Share) -> np.ndarray:
    def row(item: int) -> list[float]:
        found = clip_losses(model, source, item, bands)
        on_clip()
        return found

    return np.array(share([partial(row, item) for item in range(len(source.entries))]), dtype=np.float64)
