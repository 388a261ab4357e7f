"""Mochi's flow matching: the only room that normalises latents, interpolates noise and states the target.

One sentence fixes the convention: **sigma = 1 is pure noise, sigma = 0 is data, the network predicts clean - noise.**

    n = (z - mean) / std * scale         normalised latents, what the transformer lives in
    x = (1 - sigma) n + sigma noise      its input
    v = n - noise                        its target (so dx/dsigma = -v, and sampling adds (sigma_i - sigma_{i+1}) v)

Both public trainers get `n` wrong. Genmo's fine-tuner noises raw latents and applies the affine to the *difference*
(genmoai/mochi @0c86aeb `demos/fine_tuner/train.py:356-372`); cogvideox-factory's normalises nothing
(`training/mochi-1/text_to_video_lora.py`). Both samplers un-normalise at the end, so the transformer lives in `n`.

The transformer is fed (1 - sigma) * 1000: `model.transformer.predict_velocity` is the one place that flips time.

Shape legend: B = samples, C = 12 channels, T = latent frames, H, W = latent cells.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LatentStats:
    """Per-channel statistics of the VAE's latents, from its configuration (`latents_mean`, `latents_std`)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0

    def _columns(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1, 1, 1, 1)  # broadcasts over [..., C, T, H, W]
        mean = torch.tensor(self.mean, dtype=torch.float32, device=like.device).view(shape)
        std = torch.tensor(self.std, dtype=torch.float32, device=like.device).view(shape)
        return mean, std

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw VAE latents [..., C, T, H, W] of any float dtype -> normalised float32."""
        mean, std = self._columns(raw)
        return (raw.float() - mean) / std * self.scale

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [..., C, T, H, W] -> raw VAE latents, float32. Inverse of `normalise`."""
        mean, std = self._columns(latents)
        return latents.float() / self.scale * std + mean


def draw_posterior(mean: torch.Tensor, logvar: torch.Tensor, unit_noise: torch.Tensor) -> torch.Tensor:
    """z = mean + exp(logvar / 2) * unit_noise, in float32; all [..., C, T, H, W]. No clamp on logvar, as Genmo."""
    return mean.float() + torch.exp(0.5 * logvar.float()) * unit_noise


def interpolate(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x = (1 - sigma) clean + sigma noise; clean, noise [B, C, T, H, W] float32, sigma [B] in [0, 1]."""
    weight = sigma.view(-1, 1, 1, 1, 1)
    return (1 - weight) * clean + weight * noise


def velocity_target(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """v = clean - noise, [B, C, T, H, W]. Independent of sigma: the path is straight."""
    return clean - noise


def velocity_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error per sample, [B] float32: samples of different shapes weigh the same in a mean over samples."""
    return (predicted.float() - target).square().flatten(1).mean(1)


def temporal_loss(predicted: torch.Tensor, target: torch.Tensor, anchor: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Appearance-debiased velocity error per sample, [B] float32; zero for single latent frames.

    MotionDirector (Zhao et al., arXiv 2310.08465, eq. 7-8) compares phi(e_i) = sqrt(beta^2 + 1) e_i - beta e_anchor
    instead of e_i, for every other frame i: what all frames share, the appearance, weighs less. phi is linear, so the
    difference of the phis is the phi of the difference. `anchor` [B] int64 is the anchor frame of each sample.
    """
    if predicted.shape[2] == 1:
        return predicted.new_zeros(predicted.shape[0], dtype=torch.float32)
    error = predicted.float() - target
    rows = torch.arange(error.shape[0], device=error.device)
    pivot = error[rows, :, anchor].unsqueeze(2)  # [B, C, 1, H, W]
    debiased = (beta**2 + 1) ** 0.5 * error - beta * pivot
    others = torch.ones(error.shape[0], error.shape[2], device=error.device)
    others[rows, anchor] = 0  # the anchor against itself would only add appearance back
    per_frame = debiased.square().mean(dim=(1, 3, 4))
    return (per_frame * others).sum(1) / (error.shape[2] - 1)
