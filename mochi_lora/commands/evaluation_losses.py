"""Held-out velocity loss for an evaluation: the model with the adapter, and with the adapter at strength 0."""

from pathlib import Path

import torch

from mochi_lora.commands.identity import require_same_encoders
from mochi_lora.commands.models import load_planned
from mochi_lora.commands.workloads import looking_work
from mochi_lora.config.schema import Config
from mochi_lora.console import progress_bar
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import Index, index_path, read_index
from mochi_lora.engine.resolve import resolve_plan
from mochi_lora.evaluation.grid import thin
from mochi_lora.evaluation.losses import band_losses
from mochi_lora.evaluation.results import BandLoss, Missing
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.base import locate
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.spec import Bucket
from mochi_lora.training.batches import SampleSource

_MOST_CLIPS = 32  # of either side
_NAME = "evaluated"


def losses_of(config: Config, adapter: Path, *, assume_alpha_is_rank: bool = False) -> tuple[BandLoss, ...] | Missing:
    """Losses per noise level on cached clips. Missing where the data set is not encoded."""
    if not index_path(config.data).is_file():
        return Missing("losses", "the clips are not encoded (mochi-lora encode)")
    index = read_index(config.data)
    require_same_encoders(config, index)
    held_out, training = _source(config, index, "validation"), _source(config, index, "train")
    folder = locate(config.model.base, config.model.revision, "transformer")
    buckets = [Bucket.parse(entry.bucket) for source in (held_out, training) for entry in source.entries]
    alone = config.engine.model_copy(update={"parallel": "auto"})  # one process looks, whoever made the videos
    plan = resolve_plan(alone, looking_work(config, buckets)).plan
    transformer = load_planned(folder, plan, torch.device(plan.device)).transformer
    lora.put(transformer, load_adapter(adapter, assume_alpha_is_rank=assume_alpha_is_rank), _NAME)
    model = VelocityModel(transformer, plan)
    with progress_bar() as bar, lora.strengths(transformer, [_NAME], [1.0]):
        task = bar.add_task("losses", total=2 * (len(held_out.entries) + len(training.entries)))
        return band_losses(
            model,
            held_out,
            training,
            config.train.validation_bands,
            without_adapter=lambda: lora.strengths(transformer, [_NAME], [0.0]),
            resamples=config.evaluation.resamples,
            on_clip=lambda: bar.update(task, advance=1),
        )


def _source(config: Config, index: Index, split: str) -> SampleSource:
    stats = LatentStats(index.latents_mean, index.latents_std, index.latents_scale)
    entries = [entry for entry in index.entries if entry.split == split]
    return SampleSource(Cache(config.data.cache), thin(entries, _MOST_CLIPS), stats, config.objective, config.run.seed)
