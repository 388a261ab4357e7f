"""Held-out velocity loss: fixed clips, fixed sigmas, fixed noise, so that two measurements differ by the adapter alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mochi_lora.data.index import read_sample
from mochi_lora.model.flow import draw_posterior, interpolate, velocity_loss, velocity_target
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.streams import Purpose, normal, stream
from mochi_lora.training.batches import SampleSource

_RESAMPLES = 2000
_CONFIDENCE = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean over clips and bands, its 95 % bootstrap interval over clips, and the mean of each sigma band."""

    loss: float
    low: float
    high: float
    bands: tuple[float, ...]

    def scalars(self) -> dict[str, float]:
        """Names and values for the trackers; band names carry the sigma they were measured at."""
        values = {"heldout/loss": self.loss, "heldout/loss_low": self.low, "heldout/loss_high": self.high}
        for sigma, loss in zip(band_sigmas(len(self.bands)), self.bands, strict=True):
            values[f"heldout/sigma_{sigma:.3f}"] = loss
        return values


def band_sigmas(bands: int) -> tuple[float, ...]:
    """Middles of `bands` equal parts of (0, 1)."""
    return tuple((band + 0.5) / bands for band in range(bands))


def clip_losses(model: VelocityModel, source: SampleSource, item: int, bands: int) -> list[float]:
    """Loss of one held-out clip at every band's sigma; draws depend on (seed, item) only. Runs without gradient."""
    sample = read_sample(source.cache, source.entries[item])
    shape = tuple(sample.posterior.mean.shape)
    unit = torch.from_numpy(normal(source.seed, Purpose.HELD_OUT, item, shape))
    raw = draw_posterior(sample.posterior.mean, sample.posterior.logvar, unit)
    clean = source.stats.normalise(raw).unsqueeze(0).to(model.device)
    text = TextBatch.collate([sample.text]).to(model.device)
    losses = []
    for band, level in enumerate(band_sigmas(bands)):
        noise = (
            torch.from_numpy(normal(source.seed, Purpose.HELD_OUT, item, shape, lane=band + 1)).unsqueeze(0).to(model.device)
        )
        sigma = torch.tensor([level], dtype=torch.float32, device=model.device)
        with torch.no_grad():
            predicted = model(interpolate(clean, noise, sigma), sigma, text)
        losses.append(float(velocity_loss(predicted, velocity_target(clean, noise))))
    return losses


def summarise(per_clip: Sequence[Sequence[float]], seed: int) -> HeldOutLoss:
    """Statistics over clips: the clip is the unit, its bands are averaged first. One clip alone has no interval (NaN)."""
    table = np.asarray(per_clip, dtype=np.float64)
    means = table.mean(axis=1)
    low = high = float("nan")
    if len(means) > 1:
        picks = stream(seed, Purpose.BOOTSTRAP).integers(len(means), size=(_RESAMPLES, len(means)))
        low, high = (float(value) for value in np.percentile(means[picks].mean(axis=1), _CONFIDENCE))
    return HeldOutLoss(float(means.mean()), low, high, tuple(float(value) for value in table.mean(axis=0)))
