"""A few real training steps on random clips, timed: what `mochi-lora plan --measure` and the benchmark run.

The step, the loader, the optimiser and the health check are those of a run; the weights and the data are random.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from mochi_lora.config.schema import ObjectiveConfig, TrainConfig
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import IndexEntry
from mochi_lora.data.plan import BatchPlan, Share
from mochi_lora.data.samples import Posterior, TextEmbedding
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.spec import Bucket
from mochi_lora.training.batches import MicroSteps, SampleSource, steps_from
from mochi_lora.training.health import Health
from mochi_lora.training.optimizer import build_optimizer
from mochi_lora.training.trainer import Learner, train_step

TEXT_TOKENS = (120, 96, 143, 120, 80, 120, 171, 110)  # captions differ in length, as real ones do
_LOADERS = 2
GIB = 2**30
Step = Callable[[], tuple[torch.Tensor, int]]  # -> (loss on the device, visual tokens)


@dataclass(frozen=True)
class Trial:
    """What was measured; the first step compiles. GiB are None without a GPU."""

    first_seconds: float
    seconds: tuple[float, ...]  # of each timed step
    losses: tuple[float, ...]  # of every step
    tokens: int
    allocated_gib: float | None
    reserved_gib: float | None


def random_steps(
    model: VelocityModel, parameters: dict[str, nn.Parameter], bucket: Bucket, settings: TrainConfig, folder: Path
) -> Iterator[Step]:
    """`settings.steps` steps over clips of `bucket`, whose cache is written below `folder`: each rank's own."""
    device, ranks = model.device, model.ranks
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    model.train()
    learner = Learner(
        accelerator,
        model,
        parameters,
        build_optimizer(settings, parameters.values()),
        None,
        settings,
        ObjectiveConfig(),
        seed=0,
        ranks=ranks,
    )
    health = Health(device, folder, rank=0)
    share = Share(settings.batch_size, settings.gradient_accumulation, ranks.layout.data, ranks.data_rank)
    source = _random_source(bucket, model.transformer.config.text_embed_dim, folder)
    plan = BatchPlan((bucket,) * len(TEXT_TOKENS), 0, share.samples_per_step)
    micro_steps = MicroSteps(source, plan, share)
    for number, batches in steps_from(micro_steps, share, 0, settings.steps, workers=_LOADERS, pin=device.type == "cuda"):

        def step(number: int = number, batches: list = batches) -> tuple[torch.Tensor, int]:
            result = train_step(learner, health, number, batches)
            health.check()
            return result.loss, result.tokens

        yield step


def run_trial(steps: Iterator[Step], device: torch.device, warmup: int) -> Trial:
    """Run them one by one; the device is waited for at the end of each, the first `warmup` are not timed."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, losses, tokens = [], [], 0
    start = time.perf_counter()
    for step in steps:
        loss, tokens = step()
        losses.append(float(loss))  # waits
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return Trial(
        first_seconds=seconds[0],
        seconds=tuple(seconds[warmup:]),
        losses=tuple(losses),
        tokens=tokens,
        allocated_gib=torch.cuda.max_memory_allocated(device) / GIB if cuda else None,
        reserved_gib=torch.cuda.max_memory_reserved(device) / GIB if cuda else None,
    )


def _random_source(bucket: Bucket, text_width: int, folder: Path) -> SampleSource:
    """A cache of random latents and captions."""
    cache = Cache(folder)
    generator = torch.Generator().manual_seed(0)
    shape = bucket.latent_shape
    entries = []
    for number, tokens in enumerate(TEXT_TOKENS):
        key = f"{number:032d}"
        cache.write_latents(key, Posterior(torch.randn(shape, generator=generator), torch.full(shape, -6.0)), {})
        cache.write_text(key, TextEmbedding(torch.randn(tokens, text_width, generator=generator)), {})
        entries.append(IndexEntry(f"clip {number}", key, str(bucket), key, key, "", "train"))
    channels = shape[0]
    return SampleSource(cache, tuple(entries), LatentStats((0.0,) * channels, (1.0,) * channels), ObjectiveConfig(), seed=0)
