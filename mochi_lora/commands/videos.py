"""The videos of `sample` and `evaluate`: what is not there yet is made, one after the other, each written whole.

T5 comes first and alone, then transformer and VAE; where nothing is left to make, no weight is loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mochi_lora import __version__
from mochi_lora.commands.decoder import load_decoder
from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import Config
from mochi_lora.console import console, progress_bar
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.plan import Plan, resolve_plan
from mochi_lora.files import remove_abandoned, sha256_of_file
from mochi_lora.inference.generate import generate_latents, render
from mochi_lora.inference.shots import Shot, describe, in_switching_order, is_made, write_video
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.base import fingerprint, locate
from mochi_lora.model.text import TextEncoder, refuse_foreign
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import load_transformer, read_config

_ABANDONED_SECONDS = 600.0  # nobody takes that long to write one video


def make_videos(config: Config, shots: Sequence[Shot], folder: Path, *, assume_alpha_is_rank: bool = False) -> list[Path]:
    """See that every shot's video lies in `folder`, made with these settings; returns the paths in order of `shots`.

    Shots of one name are made once; they must be equal. Raises UserError for what a person can mend, before anything is made
    where it can be known before.
    """
    adapters = {choice.path for shot in shots for choice in shot.adapters}
    for path in adapters:
        load_adapter(path, assume_alpha_is_rank=assume_alpha_is_rank)  # a wrong file is told before T5 takes its minutes
    plan = resolve_plan(config.engine, _head_size(config))
    origin = _origin(config, plan)
    hashes = {path: sha256_of_file(path) for path in adapters}
    groups = in_switching_order(shots)
    there = {shot for group in groups for shot in group if is_made(folder / shot.video, describe(shot, origin, hashes))}
    if there:
        console.print(f"videos   {len(there)} of {sum(map(len, groups))} are there already")
    todo = [left for group in groups if (left := [shot for shot in group if shot not in there])]
    if todo:
        asked = {shot.prompt for group in todo for shot in group} | {config.sample.negative_prompt}
        embeddings = _embed(config, plan, sorted(asked))
        remove_abandoned(folder, older_than_seconds=_ABANDONED_SECONDS)
        studio = _Studio(config, plan, embeddings, assume_alpha_is_rank=assume_alpha_is_rank)
        studio.film(todo, lambda shot, frames: write_video(folder / shot.video, frames, describe(shot, origin, hashes)))
    return [folder / shot.video for shot in shots]


class _Studio:
    """Transformer and VAE, loaded once for many videos."""

    def __init__(self, config: Config, plan: Plan, embeddings: dict[str, TextEmbedding], *, assume_alpha_is_rank: bool) -> None:
        self._config = config
        self._device = torch.device(plan.device)
        self._embeddings = embeddings
        self._assume_alpha_is_rank = assume_alpha_is_rank
        folder = locate(config.model.base, config.model.revision, "transformer")
        transformer = load_transformer(folder, device=self._device, precision=plan.precision).transformer
        self._model = VelocityModel(transformer, plan)
        rests_on = torch.device("cpu") if config.engine.cpu_offload else None
        self._vae: MochiVae = load_decoder(config, self._device, rests_on=rests_on)

    def film(self, groups: Sequence[Sequence[Shot]], keep: Callable[[Shot, np.ndarray], None]) -> None:
        """Hand each shot's frames, uint8 [F, H, W, 3], to `keep` before the next; the shots of a group share adapter files."""
        count, steps = sum(map(len, groups)), self._config.sample.steps
        with progress_bar() as bar:
            task = bar.add_task("sampling", total=count * steps)
            for group in groups:
                with self._attached(group[0].adapters) as names:
                    for shot in group:
                        done = bar.tasks[task].completed // steps
                        bar.update(task, description=f"sampling, video {done + 1:.0f} of {count}")
                        weights = [choice.strength for choice in shot.adapters]
                        with lora.strengths(self._model.transformer, names, weights):
                            latents = self._latents(shot, lambda _done, _steps: bar.update(task, advance=1))
                        keep(shot, self._frames(latents))

    @contextmanager
    def _attached(self, adapters: Sequence[AdapterChoice]) -> Iterator[list[str]]:
        """The transformer with these files' factors on it, and their names there; gone afterwards."""
        transformer = self._model.transformer
        names = [f"adapter{number}" for number in range(len(adapters))]
        for name, choice in zip(names, adapters, strict=True):
            lora.put(transformer, load_adapter(choice.path, assume_alpha_is_rank=self._assume_alpha_is_rank), name)
        try:
            yield names
        finally:
            transformer.delete_adapters(names)

    def _latents(self, shot: Shot, on_step: Callable[[int, int], None]) -> torch.Tensor:
        sample = self._config.sample
        negative = self._embeddings[sample.negative_prompt]
        return generate_latents(self._model, self._embeddings[shot.prompt], negative, sample, shot.seed, on_step=on_step)

    def _frames(self, latents: torch.Tensor) -> np.ndarray:
        """Decoded; under offloading the two models change places for it."""
        offload, cpu = self._config.engine.cpu_offload, torch.device("cpu")
        if offload:
            self._model.to(cpu)
            self._vae.to(self._device)
        frames = render(self._vae, latents)
        if offload:
            self._vae.to(cpu)
            self._model.to(self._device)
        return frames


def _embed(config: Config, plan: Plan, prompts: list[str]) -> dict[str, TextEmbedding]:
    """Each prompt through T5, which is gone from memory afterwards. Names prompts that are cut; refuses foreign ones."""
    base = locate(config.model.base, config.model.revision, "text_encoder").parent
    locate(config.model.base, config.model.revision, "tokenizer")
    encoder = TextEncoder.load(base, device=torch.device(plan.device), precision=config.encode.text_precision)
    told = encoder.tokenise(prompts)
    refuse_foreign(prompts, told)
    for prompt in (prompt for prompt, item in zip(prompts, told, strict=True) if item.truncated):
        console.print(f"cut at 256 tokens: {prompt[:60]}...", style="yellow", markup=False)
    embeddings = dict(zip(prompts, encoder.embed(prompts), strict=True))
    del encoder
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return embeddings


def _head_size(config: Config) -> int:
    folder = locate(config.model.base, config.model.revision, "transformer")
    return read_config(folder)["attention_head_dim"]


def _origin(config: Config, plan: Plan) -> dict[str, Any]:
    """All that makes a video, besides its prompt, seed and adapters."""
    parts = ("transformer", "text_encoder", "vae")
    prints = {part: fingerprint(locate(config.model.base, config.model.revision, part)) for part in parts}
    sample = config.sample.model_dump(mode="json", exclude={"prompts", "seeds", "strength"})
    return {
        "base": config.model.base,
        "base_revision": config.model.revision,
        "base_fingerprint": prints["transformer"],
        "vae_fingerprint": prints["vae"],
        "text_fingerprint": prints["text_encoder"],
        "text_precision": config.encode.text_precision,
        "plan": asdict(plan),
        "vae_tiling": config.engine.vae_tiling,
        **sample,
        "versions": {"mochi_lora": __version__}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }
