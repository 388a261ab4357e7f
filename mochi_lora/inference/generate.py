"""One video: prompt embedding and seed to latents, latents to frames. Shared by `sample` and by previews in training."""

from collections.abc import Callable

import numpy as np
import torch

from mochi_lora.config.schedule import guidance_schedule, linear_quadratic_schedule
from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.inference.sampler import Velocity, draw_noise, sample_latents
from mochi_lora.inference.video import to_uint8
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.spec import Bucket


def condition(model: VelocityModel, text: TextEmbedding) -> Velocity:
    """The model with its text filled in."""
    batch = TextBatch.collate([text]).to(model.device)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model(latents, sigma, batch)

    return velocity


def generate_latents(
    model: VelocityModel,
    prompt: TextEmbedding,
    negative: TextEmbedding,
    settings: SampleConfig,
    seed: int,
    *,
    on_step: Callable[[int, int], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Normalised latents [C, T, H, W] float32 on the model's device. A function of its arguments alone; changes no
    random state. Raises `sampler.Cancelled` between two steps when asked to.
    """
    bucket = Bucket(settings.frames, settings.height, settings.width)
    noise = draw_noise(seed, (1, *bucket.latent_shape)).to(model.device)
    latents = sample_latents(
        condition(model, prompt),
        condition(model, negative),
        noise,
        linear_quadratic_schedule(settings.steps, settings.threshold_noise, settings.linear_steps),
        guidance_schedule(settings.guidance, settings.steps),
        on_step=on_step,
        cancelled=cancelled,
    )
    return latents[0]


def render(vae: MochiVae, latents: torch.Tensor) -> np.ndarray:
    """Normalised latents [C, T, H, W] -> frames [F, H, W, 3] uint8."""
    return to_uint8(vae.decode(vae.stats.denormalise(latents)).cpu())
