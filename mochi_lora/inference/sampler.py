"""Noise to latents: Euler along the straight path. A pure function; models, prompts and devices are the caller's.

Genmo's sampler exactly (genmoai/mochi @0c86aeb `pipelines.py:408-484`): latents, sigma and guidance in float32, the model
alone at lower precision. diffusers' `MochiPipeline` keeps the latents in bf16, whose spacing around 1 is 2^-8 to 2^-7: half of
64 steps are 0.0008 wide, move most latents by less than half of that, and are lost in rounding.

Shape legend: B = videos, C = 12 channels, T = latent frames, H, W = latent cells.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch


class Velocity(Protocol):
    """The model under one condition (a prompt, or the null prompt)."""

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, T, H, W] float32, sigma [B] float32 -> velocity clean - noise, shaped as the latents."""
        ...


class Velocities(Protocol):
    """The model under the prompt and under the null prompt at once."""

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Velocity` would give for each of the two, the prompt's first."""
        ...


class Cancelled(Exception):  # noqa: N818 - asked for, not an error
    """The caller's `cancelled` said so between two steps."""


def draw_noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 of `shape` on the CPU, a function of (seed, shape) alone; no global generator is touched.

    numpy's Philox keyed by `seed`. Genmo draws from the global CUDA generator, so its seeds give other videos than ours.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _ignore_step(_done: int, _steps: int) -> None:
    """Nobody watches."""


def _never() -> bool:
    return False


@torch.no_grad()
def sample_latents(
    conditional: Velocity,
    unconditional: Velocity,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    guidance: Sequence[float],
    *,
    both: Velocities | None = None,
    on_step: Callable[[int, int], None] = _ignore_step,
    cancelled: Callable[[], bool] = _never,
) -> torch.Tensor:
    """Integrate `noise` [B, C, T, H, W] float32 along `sigmas` (N + 1, falling from 1 to 0) to normalised latents, float32.

    Step i adds (sigma_i - sigma_{i+1}) (u + s (c - u)), s = guidance[i]. Where s is 1 the null prompt cannot matter and
    `unconditional` is not called; elsewhere `both`, if given, is called instead of the two. `on_step(done, N)` follows each
    step; `cancelled` is asked before each and ends the sampling with `Cancelled`. Raises ValueError if `guidance` does not hold
    N scales.
    """
    assert noise.dtype == torch.float32, f"latents stay float32 through sampling, got {noise.dtype}"
    steps = len(sigmas) - 1
    latents = noise
    for done, ((sigma, next_sigma), scale) in enumerate(zip(pairwise(sigmas), guidance, strict=True), start=1):
        if cancelled():
            raise Cancelled
        level = torch.full((noise.shape[0],), sigma, dtype=torch.float32, device=noise.device)
        if scale == 1:
            velocity = conditional(latents, level).float()
        else:
            told, null = both(latents, level) if both else (conditional(latents, level), unconditional(latents, level))
            velocity = null.float() + scale * (told.float() - null.float())
        latents = latents + (sigma - next_sigma) * velocity
        on_step(done, steps)
    return latents
