"""The videos of `sample` and `evaluate`: what is not there yet is made, one after the other, each written whole.

T5 comes first and alone, then transformer and VAE; where nothing is left to make, no weight is loaded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mochi_lora import __version__
from mochi_lora.config.schema import Config
from mochi_lora.console import console, progress_bar
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.plan import Plan, resolve_device
from mochi_lora.files import remove_abandoned, sha256_of_file
from mochi_lora.inference.live import LiveSampler
from mochi_lora.inference.prompts import embed_prompts
from mochi_lora.inference.shots import Shot, describe, in_switching_order, is_made, told_settings, write_video
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.base import fingerprint, locate
from mochi_lora.parallel.mesh import ALONE, Ranks
from mochi_lora.runs.models import load_sampler, load_text, sampling_plan
from mochi_lora.runs.processes import agreed, decided, least_room, out_of_memory_named

_ABANDONED_SECONDS = 600.0  # nobody takes that long to write one video


def make_videos(
    config: Config, shots: Sequence[Shot], folder: Path, *, assume_alpha_is_rank: bool = False, ranks: Ranks = ALONE
) -> list[Path]:
    """See that every shot's video lies in `folder`, made with these settings; returns the paths in order of `shots`.

    The processes of a launch share the videos, or the tokens of one; all have returned only when all are made.
    Shots of one name are made once; they must be equal. Raises UserError for what a person can mend, before anything is made
    where it can be known before.
    """
    adapters = {choice.path for shot in shots for choice in shot.adapters}
    for path in adapters:
        load_adapter(path, assume_alpha_is_rank=assume_alpha_is_rank)  # a wrong file is told before T5 takes its minutes
    room = least_room(torch.device(resolve_device(config.engine.device)))
    resolved = decided(partial(sampling_plan, config, ranks=ranks, room=room))
    plan = resolved.plan
    origin = origin_of(config, plan)
    hashes = {path: sha256_of_file(path) for path in adapters}
    groups = in_switching_order(shots)
    there = {shot for group in groups for shot in group if is_made(folder / shot.video, describe(shot, origin, hashes))}
    there = agreed(there)  # before anybody writes
    if there:
        console.print(f"videos   {len(there)} of {sum(map(len, groups))} are there already")
    todo = [left for group in groups if (left := [shot for shot in group if shot not in there])]
    if todo:
        asked = {shot.prompt for group in todo for shot in group} | {config.sample.negative_prompt}
        embeddings = _embed(config, plan, asked)
        if ranks.rank == 0:
            remove_abandoned(folder, older_than_seconds=_ABANDONED_SECONDS)
        numbers = {shot: number for number, shot in enumerate(shot for group in todo for shot in group)}

        def keep(shot: Shot, latents: torch.Tensor) -> None:
            sampler.require_unchanged(hashes)
            if ranks.keeps(numbers[shot]):
                write_video(folder / shot.video, sampler.frames(latents), describe(shot, origin, hashes))

        own = ranks.own(len(numbers))
        mine = [[shot for shot in group for _ in range(own.count(numbers[shot]))] for group in todo]
        with out_of_memory_named(resolved.when_full()):
            sampler = load_sampler(config, plan, assume_alpha_is_rank=assume_alpha_is_rank, ranks=ranks)
            _film(config, sampler, embeddings, [group for group in mine if group], keep)
    if ranks.layout.world > 1:
        dist.barrier()
    return [folder / shot.video for shot in shots]


def _film(
    config: Config,
    sampler: LiveSampler,
    embeddings: dict[str, TextEmbedding],
    groups: Sequence[Sequence[Shot]],
    keep: Callable[[Shot, torch.Tensor], None],
) -> None:
    """Hand each shot's latents to `keep` before the next; the shots of a group share adapter files."""
    sample = config.sample
    negative, count = embeddings[sample.negative_prompt], sum(map(len, groups))
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=count * sample.steps)

        def advance(_done: int, _steps: int) -> None:
            bar.update(task, advance=1)

        for group in groups:
            for shot in group:
                done = bar.tasks[task].completed // sample.steps
                bar.update(task, description=f"sampling, video {done + 1:.0f} of {count}")
                prompt = embeddings[shot.prompt]
                latents = sampler.latents(prompt, negative, sample, shot.seed, shot.adapters, on_step=advance)
                keep(shot, latents)
            sampler.let_go([choice.path for choice in group[0].adapters])


def _embed(config: Config, plan: Plan, prompts: Iterable[str]) -> dict[str, TextEmbedding]:
    """Each prompt through T5, which is gone from memory afterwards. Names prompts that are cut; refuses foreign ones."""
    encoder = load_text(config, device=torch.device(plan.device))
    found = embed_prompts(encoder, prompts)
    for prompt, item in found.told.items():
        if item.truncated:
            console.print(f"cut at 256 tokens: {prompt[:60]}...", style="yellow", markup=False)
    del encoder
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return found.embeddings


def origin_of(config: Config, plan: Plan) -> dict[str, Any]:
    """All that makes a video, besides its prompt, seed and adapters."""
    parts = ("transformer", "text_encoder", "vae")
    prints = {part: fingerprint(locate(config.model.base, config.model.revision, part)) for part in parts}
    return {
        "base": config.model.base,
        "base_revision": config.model.revision,
        "base_fingerprint": prints["transformer"],
        "vae_fingerprint": prints["vae"],
        "text_fingerprint": prints["text_encoder"],
        "text_precision": config.encode.text_precision,
        "plan": asdict(plan),
        **told_settings(config.sample),
        "versions": {"mochi_lora": __version__}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }
