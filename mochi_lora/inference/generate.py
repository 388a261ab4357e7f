"""One video: prompt embedding and seed to latents, latents to frames. Shared by `sample` and by previews in training."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mochi_lora.config.schedule import guidance_inside, guidance_schedule, linear_quadratic_schedule
from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.inference.sampler import Velocities, Velocity, draw_noise, sample_latents
from mochi_lora.inference.video import to_uint8
from mochi_lora.model.step_cache import StepCache
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.spec import Bucket


def condition(model: VelocityModel, text: TextEmbedding, cache: StepCache | None = None) -> Velocity:
    """The model with its text filled in, for one video; a `cache` (not exact) spares steps."""
    batch = TextBatch.collate([text]).to(model.device)
    caches = () if cache is None else (cache,)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model(latents, sigma, batch, caches)

    return velocity


def conditions(
    model: VelocityModel, prompt: TextEmbedding, negative: TextEmbedding, caches: Sequence[StepCache] = ()
) -> Velocities:
    """The model with both texts filled in, for one video in a batch of two; `caches` as `condition`'s two would have them."""
    batch = TextBatch.collate([prompt, negative]).to(model.device)

    def velocities(latents: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        told, null = model(torch.cat([latents, latents]), torch.cat([sigma, sigma]), batch, caches).chunk(2)
        return told, null

    return velocities


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
    caches = _caches(settings, settings.steps, sum(scale != 1 for scale in scales))
    alone = caches or (None, None)
    latents = sample_latents(
        condition(model, prompt, alone[0]),
        condition(model, negative, alone[1]),
        noise,
        sigmas,
        scales,
        both=conditions(model, prompt, negative, caches) if model.plan.guidance_passes == "one" else None,
        on_step=on_step,
        cancelled=cancelled,
    )
    return latents[0]


def _caches(settings: SampleConfig, *calls: int) -> tuple[StepCache, ...]:
    """One for each condition, which is asked that often; none where every step is computed."""
    return tuple(StepCache(settings.step_cache, count) for count in calls) if settings.step_cache else ()


def render(vae: MochiVae, latents: torch.Tensor) -> np.ndarray:
    """Normalised latents [C, T, H, W] -> frames [F, H, W, 3] uint8."""
    return to_uint8(vae.decode(vae.stats.denormalise(latents)).cpu())
