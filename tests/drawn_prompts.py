"""Clips of mochi-tiny for sentences of the drawn world, made as `mochi-lora sample` makes them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mochi_lora.config.load import load_config
from mochi_lora.config.requests import AdapterChoice
from mochi_lora.runs.models import load_sampler, load_text, sampling_plan
from mochi_lora.tiny import world
from mochi_lora.tiny.pretrained import WEIGHTS


def drawn(sentences: Sequence[str], adapter: Path | None = None, *, guidance: float = 3.0, steps: int = 16) -> np.ndarray:
    """uint8 [N, F, H, W, 3], one clip per sentence, each from a seed of its own."""
    words = {"model.base": WEIGHTS, "engine.device": "cpu", "engine.precision": "fp32", "encode.text_precision": "fp32"}
    words |= {"sample.frames": world.FRAMES, "sample.height": world.HEIGHT, "sample.width": world.WIDTH}
    words |= {"sample.steps": steps, "sample.guidance": guidance, "engine.guidance_passes": "one"}  # a tenth less time here
    config = load_config(None, [f"--{name}={value}" for name, value in words.items()])
    null, *texts = load_text(config, device=torch.device("cpu")).embed(["", *sentences])
    sampler = load_sampler(config, sampling_plan(config).plan, assume_alpha_is_rank=False)
    chosen = [AdapterChoice(adapter, 1.0)] if adapter else []
    clips = []
    for seed, text in enumerate(texts):
        latents = sampler.latents(text, null, config.sample, seed, chosen, on_step=lambda _done, _steps: None)
        clips.append(sampler.frames(latents))
    return np.stack(clips)
