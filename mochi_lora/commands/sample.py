"""`mochi-lora sample`: base plus adapters to videos. T5 first and alone, then transformer and VAE."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mochi_lora import __version__
from mochi_lora.commands.decoder import load_decoder
from mochi_lora.commands.processes import out_of_memory_named
from mochi_lora.commands.run_folder import final_adapter
from mochi_lora.config.requests import AdapterChoice, SampleRequest
from mochi_lora.config.schema import Config
from mochi_lora.console import console, progress_bar
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.errors import UserError
from mochi_lora.files import sha256_of_file, write_json
from mochi_lora.inference.generate import generate_latents, render
from mochi_lora.inference.video import glimpse, video_name, write_contact_sheet, write_mp4
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.base import fingerprint, locate
from mochi_lora.model.plan import Plan, resolve_plan
from mochi_lora.model.text import TextEncoder, refuse_foreign
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import load_transformer, read_config


@out_of_memory_named()
def run(config: Config, request: SampleRequest) -> list[Path]:
    """Make every video asked for; returns their paths. Raises UserError for what a person can mend."""
    jobs = request.videos(config.sample.prompts, config.sample.seeds)
    if not jobs:
        message = "no prompt: give --prompt, --prompts FILE, or sample.prompts in the configuration"
        raise UserError(message)
    adapters = _adapters(config, request)
    loaded = [load_adapter(choice.path, assume_alpha_is_rank=request.assume_alpha_is_rank) for choice in adapters]
    plan = resolve_plan(config.engine, _head_size(config))
    embeddings = _embed(config, plan, sorted({prompt for prompt, _ in jobs} | {config.sample.negative_prompt}))
    folder = request.output or config.run.folder / "samples" / time.strftime("sample-%Y%m%d-%H%M%S")
    transformer = load_transformer(
        locate(config.model.base, config.model.revision, "transformer"),
        device=torch.device(plan.device),
        precision=plan.precision,
    ).transformer
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, loaded, strict=True):
        lora.put(transformer, adapter, name)
    model = VelocityModel(transformer, plan)
    rests_on = torch.device("cpu") if config.engine.cpu_offload else None
    vae = load_decoder(config, torch.device(plan.device), rests_on=rests_on)
    origin = _origin(config, plan, adapters)
    with lora.strengths(transformer, names, [choice.strength for choice in adapters]):
        paths, rows = _make(config, model, vae, embeddings, jobs, folder, origin)
    sheet = folder / "sheet.png"
    write_contact_sheet(sheet, rows)
    for path in paths:
        console.print(f"video    {path}", markup=False)
    console.print(f"sheet    {sheet}", markup=False)
    return paths


def _make(
    config: Config,
    model: VelocityModel,
    vae: MochiVae,
    embeddings: dict[str, TextEmbedding],
    jobs: list[tuple[str, int]],
    folder: Path,
    origin: dict[str, Any],
) -> tuple[list[Path], list[tuple[str, np.ndarray]]]:
    """One video after the other, each written (with its JSON) before the next begins."""
    paths, rows = [], []
    device = torch.device(model.plan.device)
    negative = embeddings[config.sample.negative_prompt]
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar())
        task = bar.add_task("sampling", total=len(jobs) * config.sample.steps)
        for number, (prompt, seed) in enumerate(jobs):
            latents = generate_latents(
                model,
                embeddings[prompt],
                negative,
                config.sample,
                seed,
                on_step=lambda _done, _steps: bar.update(task, advance=1),
            )
            if config.engine.cpu_offload:
                model.to("cpu")
                vae.to(device)
            frames = render(vae, latents)
            if config.engine.cpu_offload:
                vae.to(torch.device("cpu"))
                model.to(device)
            path = folder / video_name(number, prompt, seed)
            write_mp4(path, frames)
            write_json(path.with_suffix(".json"), {"prompt": prompt, "seed": seed, **origin})
            paths.append(path)
            rows.append((f"{prompt} (seed {seed})", glimpse(frames)))
    return paths, rows


def _adapters(config: Config, request: SampleRequest) -> list[AdapterChoice]:
    """Those asked for, else the run's own at sample.strength."""
    if request.base_only:
        return []
    if request.adapters:
        return list(request.adapters)
    own = final_adapter(config)
    if not own.exists():
        message = f"{own}: this run has no finished adapter yet; train first, or give --adapter PATH or --base-only"
        raise UserError(message)
    return [AdapterChoice(own, config.sample.strength)]


def _embed(config: Config, plan: Plan, prompts: list[str]) -> dict[str, TextEmbedding]:
    """T5 comes, embeds and goes, before anything else is loaded."""
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


def _origin(config: Config, plan: Plan, adapters: list[AdapterChoice]) -> dict[str, Any]:
    """All that made a video, besides its prompt and seed."""
    folder = locate(config.model.base, config.model.revision, "transformer")
    used = [{"path": str(item.path), "strength": item.strength, "sha256": sha256_of_file(item.path)} for item in adapters]
    sample = config.sample.model_dump(mode="json", exclude={"prompts", "seeds", "strength"})
    return {
        "adapters": used,
        "base": config.model.base,
        "base_revision": config.model.revision,
        "base_fingerprint": fingerprint(folder),
        "vae_fingerprint": fingerprint(folder.parent / "vae"),
        "text_fingerprint": fingerprint(folder.parent / "text_encoder"),
        "text_precision": config.encode.text_precision,
        "plan": asdict(plan),
        "vae_tiling": config.engine.vae_tiling,
        **sample,
        "versions": {"mochi_lora": __version__}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }
