"""One video: prompt embedding and seed to latents, latents to frames. Shared by `sample` and by previews in training."""

from collections.abc import Callable

import numpy as np
import torch

from mochi_lora.config.schedule import guidance_inside, guidance_schedule, linear_quadratic_schedule
from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.inference.sampler import Velocity, draw_noise, sample_latents
from mochi_lora.inference.video import to_uint8
from mochi_lora.model.step_cache import StepCache
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.spec import Bucket


def condition(model: VelocityModel, text: TextEmbedding, cache: StepCache | None = None) -> Velocity:
    """The model with its text filled in, for one video; a `cache` (not exact) spares steps."""
    batch = TextBatch.collate([text]).to(model.device)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model(latents, sigma, batch, cache)

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
    sigmas = linear_quadratic_schedule(settings.steps, settings.threshold_noise, settings.linear_steps)
    scales = guidance_inside(guidance_schedule(settings.guidance, settings.steps), sigmas, settings.guidance_interval)
    guided = sum(scale != 1 for scale in scales)
    latents = sample_latents(
        condition(model, prompt, _cache(settings, settings.steps)),
        condition(model, negative, _cache(settings, guided)),
        noise,
        sigmas,
        scales,
        on_step=on_step,
        cancelled=cancelled,
    )
    return latents[0]


def _cache(settings: SampleConfig, calls: int) -> StepCache | None:
    return StepCache(settings.step_cache, calls) if settings.step_cache else None


def render(vae: MochiVae, latents: torch.Tensor) -> np.ndarray:
    """Normalised latents [C, T, H, W] -> frames [F, H, W, 3] uint8."""
    return to_uint8(vae.decode(vae.stats.denormalise(latents)).cpu())
