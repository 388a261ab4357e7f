"""Held-out velocity loss for an evaluation: the model with the adapter, and with the adapter at strength 0."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mochi_lora.config.schema import Config
from mochi_lora.console import progress_bar
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import Index, index_path, read_index
from mochi_lora.engine.plan import resolve_device
from mochi_lora.evaluation.grid import thin
from mochi_lora.evaluation.losses import band_losses
from mochi_lora.evaluation.results import BandLoss, Missing
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.base import locate
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.parallel.mesh import ALONE, Ranks, open_ranks, share_out
from mochi_lora.planning.resolve import resolve_plan
from mochi_lora.runs.identity import require_same_encoders
from mochi_lora.runs.models import load_planned
from mochi_lora.runs.processes import LONG_WAIT_MINUTES, decided, least_room, out_of_memory_named, processes_here
from mochi_lora.runs.workloads import looking_work
from mochi_lora.spec import Bucket
from mochi_lora.training.batches import SampleSource

_MOST_CLIPS = 32  # of either side
_NAME = "evaluated"


def losses_of(
    config: Config, adapter: Path, *, assume_alpha_is_rank: bool = False, ranks: Ranks = ALONE
) -> tuple[BandLoss, ...] | Missing:
    """Losses per noise level on cached clips, which the processes of a launch share; the same on each of them. Missing where
    the data set is not encoded.
    """
    if not index_path(config.data).is_file():
        return Missing("losses", "the clips are not encoded (mochi-lora encode)")
    index = read_index(config.data)
    require_same_encoders(config, index)
    held_out, training = _source(config, index, "validation"), _source(config, index, "train")
    folder = locate(config.model.base, config.model.revision, "transformer")
    buckets = [Bucket.parse(entry.bucket) for source in (held_out, training) for entry in source.entries]
    # Each clip whole on one process, whoever made the videos: its tokens need not divide as theirs do, and no loss depends on
    # how many processes there are. A base that was split stays so.
    looking = open_ranks(replace(ranks.layout, context=1), LONG_WAIT_MINUTES)
    engine = config.engine.model_copy(update={"parallel": str(looking.layout)})
    work = replace(looking_work(config, buckets), world=looking.layout.world, processes=processes_here())
    room = least_room(torch.device(resolve_device(engine.device)))
    resolved = decided(lambda: resolve_plan(engine, work, room))
    plan = resolved.plan
    with out_of_memory_named(resolved.when_full()):
        transformer = load_planned(folder, plan, torch.device(plan.device)).transformer
        lora.put(transformer, load_adapter(adapter, assume_alpha_is_rank=assume_alpha_is_rank), _NAME)
        model = VelocityModel(transformer, plan, looking)
        with progress_bar() as bar, lora.strengths(transformer, [_NAME], [1.0]):
            count = sum(len(looking.own(len(source.entries))) for source in (held_out, training))
            task = bar.add_task("losses", total=2 * count)
            return band_losses(
                model,
                held_out,
                training,
                config.train.validation_bands,
                without_adapter=lambda: lora.strengths(transformer, [_NAME], [0.0]),
                resamples=config.evaluation.resamples,
                on_clip=lambda: bar.update(task, advance=1),
                share=partial(share_out, ranks=looking),
            )


def _source(config: Config, index: Index, split: str) -> SampleSource:
    stats = LatentStats(index.latents_mean, index.latents_std, index.latents_scale)
    entries = [entry for entry in index.entries if entry.split == split]
    return SampleSource(Cache(config.data.cache), thin(entries, _MOST_CLIPS), stats, config.objective, config.run.seed)
