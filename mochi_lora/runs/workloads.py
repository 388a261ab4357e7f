"""What the commands ask of the machine, for predictions: from the configuration and the model's dimensions, no weight read."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from mochi_lora.config.engine import parallel_sizes
from mochi_lora.config.schedule import guidance_schedule
from mochi_lora.config.schema import AdapterConfig, Config
from mochi_lora.engine.precision import Precision
from mochi_lora.errors import UserError
from mochi_lora.model.adapter import target_pattern
from mochi_lora.model.base import locate
from mochi_lora.model.weights import read_config, stored_precision
from mochi_lora.planning.footprint import GIB
from mochi_lora.planning.workload import AdapterSize, Films, ModelSize, Workload
from mochi_lora.spec import Bucket

_MOMENT_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}  # per parameter
_TEXT_GIB = {"bf16": 9.0, "fp32": 18.0, "int8": 5.0}  # T5-XXL
# Decoding by `model.vae`'s count: a chunk's activations, or a short video's whole; the video itself twice in float32; weights.
_CHUNK_GIB, _PIXEL_BYTES, _FRAME_BYTES, _VAE_GIB = 7.0, 1880, 24, 0.9


@dataclass(frozen=True)
class Base:
    """The frozen model, as far as its config.json says."""

    size: ModelSize
    stored: Precision | None  # quantised already, to this


def training_work(config: Config, base: Base, buckets: Iterable[Bucket], processes: int = 1, world: int = 1) -> Workload:
    """A run of `train` over clips of these shapes, by `world` processes, of which each host has `processes`."""
    settings = config.train
    films = film_work(config) if settings.sample_every and config.sample.prompts else None
    adapter = AdapterSize(
        adapter_parameters(config.adapter, base.size), _MOMENT_BYTES[settings.optimizer], bool(settings.ema_decay)
    )
    largest = max(buckets, key=lambda bucket: bucket.tokens)
    return Workload(
        model=base.size,
        bucket=largest,
        batch=settings.batch_size,
        micro_steps=settings.gradient_accumulation,
        adapter=adapter,
        films=films,
        stored=base.stored,
        processes=processes,
        context=parallel_sizes(config.engine.parallel).get("context", 1),
        world=world,
    )


def sampling_work(config: Config, *, with_text: bool = False, processes: int = 1) -> Workload:
    """Making videos by `processes` on this host, with T5 on the device all the time or gone before."""
    films = film_work(config)
    beside = _TEXT_GIB[config.encode.text_precision] if with_text else 0.0
    base = base_here(config)
    context = parallel_sizes(config.engine.parallel).get("context", 1)
    one = Workload(base.size, films.bucket, 1, 1, None, films, stored=base.stored, beside_gib=beside)
    return replace(one, processes=processes, context=context)


def looking_work(config: Config, buckets: Iterable[Bucket]) -> Workload:
    """Passes without gradients over clips of these shapes."""
    base = base_here(config)
    return Workload(base.size, max(buckets, key=lambda bucket: bucket.tokens), 1, 1, None, None, stored=base.stored)


def film_work(config: Config) -> Films:
    """One video as `sample` says."""
    sample = config.sample
    bucket = Bucket(sample.frames, sample.height, sample.width)
    pixels = bucket.frames * bucket.height * bucket.width
    decoding = min(_CHUNK_GIB, _PIXEL_BYTES * pixels / GIB) + _FRAME_BYTES * pixels / GIB + _VAE_GIB
    guided = any(scale != 1 for scale in guidance_schedule(sample.guidance, sample.steps))
    return Films(bucket, sample.steps, guided, decoding, _VAE_GIB)


def base_here(config: Config) -> Base:
    """The base that lies here. Raises UserError where there is none."""
    return base_of(locate(config.model.base, config.model.revision, "transformer"))


def base_of(folder: Path) -> Base:
    """Of a `transformer` folder."""
    dimensions = read_config(folder)
    stored = stored_precision(dimensions)
    return Base(ModelSize.of(dimensions), cast("Precision", stored) if stored in get_args(Precision) else None)


def base_or_published(config: Config) -> tuple[Base, bool]:
    """The base, or Mochi-1 as published for a hub id that is not here yet; True where it was read."""
    try:
        return base_here(config), True
    except UserError:
        if Path(config.model.base).exists():
            raise
        return Base(ModelSize.of({}), None), False


def adapter_parameters(settings: AdapterConfig, size: ModelSize) -> int:
    """Trainable parameters that `adapter.targets` and `adapter.rank` come to."""
    pattern = re.compile(target_pattern(settings.targets, size.layers))
    hit = [(inputs, outputs) for name, inputs, outputs in size.linears() if pattern.fullmatch(name)]
    return sum(settings.rank * (inputs + outputs) + settings.dora * outputs for inputs, outputs in hit)
