"""From cached samples to `Batch`es on the way to the device: the only reader of the cache in training.

Everything random about a sample (posterior, noise, sigma, caption dropout, anchor) is a function of (seed, position).
Shape legend: B = samples, C = 12 channels, T = latent frames, H, W = latent cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from mochi_lora.config.schema import ObjectiveConfig
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import IndexEntry, read_sample
from mochi_lora.data.plan import BatchPlan, Share
from mochi_lora.data.samples import CachedSample, TextEmbedding
from mochi_lora.errors import UserError
from mochi_lora.model.flow import LatentStats, draw_posterior
from mochi_lora.model.transformer import TextBatch
from mochi_lora.spec import PATCH
from mochi_lora.streams import Purpose, normal, stream
from mochi_lora.training.noise_levels import draw_sigma
from mochi_lora.training.stopping import obey_parent_alone, told_apart


@dataclass(frozen=True)
class Batch:
    """What one micro-step trains on, drawn and normalised."""

    clean: torch.Tensor  # [B, C, T, H, W] float32, normalised
    noise: torch.Tensor  # like clean, standard normal
    sigma: torch.Tensor  # [B] float32 in (0, 1)
    anchor: torch.Tensor  # [B] int64, anchor frame of the temporal term
    text: TextBatch
    clips: tuple[str, ...]
    positions: tuple[int, ...]
    sigmas: tuple[float, ...]  # sigma again, on the host: naming a bad sample must not wait for the device

    def pin_memory(self) -> "Batch":
        """Page-locked copy, called by the DataLoader."""
        text = TextBatch(self.text.tokens.pin_memory(), self.text.lengths)
        tensors = {name: getattr(self, name).pin_memory() for name in ("clean", "noise", "sigma", "anchor")}
        return replace(self, text=text, **tensors)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory do not wait."""
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in ("clean", "noise", "sigma", "anchor")}
        return replace(self, text=self.text.to(device), **tensors)

    @property
    def tokens(self) -> int:
        """Visual tokens in the batch."""
        size, _, frames, height, width = self.clean.shape
        return size * frames * (height // PATCH) * (width // PATCH)


@dataclass(frozen=True)
class SampleSource:
    """Everything that turns (item, position) into a drawn sample."""

    cache: Cache
    entries: tuple[IndexEntry, ...]
    stats: LatentStats
    objective: ObjectiveConfig
    seed: int

    def batch(self, items: tuple[int, ...], positions: tuple[int, ...]) -> Batch:
        """Read `items` and draw for `positions`; all items share a bucket."""
        samples = [read_sample(self.cache, self.entries[item]) for item in items]
        drawn = [self._draw(sample, position) for sample, position in zip(samples, positions, strict=True)]
        sigmas = tuple(draw_sigma(self.objective, self.seed, position) for position in positions)
        return Batch(
            clean=torch.stack([clean for clean, _, _, _ in drawn]),
            noise=torch.stack([noise for _, noise, _, _ in drawn]),
            sigma=torch.tensor(sigmas, dtype=torch.float32),
            anchor=torch.tensor([anchor for _, _, _, anchor in drawn]),
            text=TextBatch.collate([text for _, _, text, _ in drawn]),
            clips=tuple(sample.clip for sample in samples),
            positions=positions,
            sigmas=sigmas,
        )

    def _draw(self, sample: CachedSample, position: int) -> tuple[torch.Tensor, torch.Tensor, TextEmbedding, int]:
        mean, logvar = sample.posterior.mean, sample.posterior.logvar
        shape = tuple(mean.shape)
        unit = torch.from_numpy(normal(self.seed, Purpose.POSTERIOR, position, shape))
        clean = self.stats.normalise(draw_posterior(mean, logvar, unit))
        noise = torch.from_numpy(normal(self.seed, Purpose.NOISE, position, shape))
        text = sample.text
        if stream(self.seed, Purpose.CAPTION_DROPOUT, position).random() < self.objective.caption_dropout:
            text = TextEmbedding(text.tokens[:0])  # the null prompt of sampling, by construction
        anchor = int(stream(self.seed, Purpose.ANCHOR, position).integers(shape[1]))
        return clean, noise, text, anchor


class MicroSteps(Dataset[Batch | UserError]):
    """This rank's micro-steps by number: micro-step m of optimiser step s has number s * accumulation + m.

    An error for people is handed over as a value: raised in a loader process it would arrive wrapped in a traceback.
    """

    def __init__(self, source: SampleSource, plan: BatchPlan, share: Share) -> None:
        self._source = source
        self._plan = plan
        self._share = share

    def __getitem__(self, number: int) -> Batch | UserError:
        step, micro_step = divmod(number, self._share.accumulation)
        items = self._plan.items(step)
        places = self._share.places(micro_step)
        positions = tuple(step * self._plan.samples_per_step + place for place in places)
        try:
            return self._source.batch(tuple(items[place] for place in places), positions)
        except UserError as error:
            return error


def steps_from(
    micro_steps: MicroSteps, share: Share, start: int, stop: int, *, workers: int, pin: bool
) -> Iterator[tuple[int, list[Batch]]]:
    """(step, its micro-batches) for steps start..stop-1. Order and content do not depend on `workers`.

    Raises DamagedFileError, when its step comes, for a cache entry that is not what was written.
    """
    numbers = range(start * share.accumulation, stop * share.accumulation)
    loader = DataLoader(
        micro_steps, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=pin, worker_init_fn=obey_parent_alone
    )
    with told_apart():
        batches = iter(loader)
    for step in range(start, stop):
        yield step, [_raised(next(batches)) for _ in range(share.accumulation)]


def _raised(found: Batch | UserError) -> Batch:
    if isinstance(found, UserError):
        try:
            raise found
        finally:
            # The error holds this frame: the cycle would keep the loader's processes until the garbage collector comes.
            del found
    return found
