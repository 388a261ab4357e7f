"""The element-wise passes between the VAE's convolutions and matrix products, each over memory once where it is compiled.

Shape legend as in `model.vae_layers`: T = frames, H, W = cells, C = channels. `scale` and `offset` are [T, 1, 1, C], float32
or better, and so is the arithmetic; results are rounded once, to the dtype of what they are written to.
"""

import torch
import torch.nn.functional as F

from mochi_lora.model.fusion import fused


def activated(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """SiLU of x * scale + offset, in the dtype of x [T, H, W, C]."""
    return F.silu(x * scale + offset).to(x.dtype)


@fused(moving=1)
def norm_line(
    x: torch.Tensor, added: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Norm.forward`, [T, C]. First each channel for itself, which reads memory in order; then the channels of a group."""
    variance, mean = torch.var_mean(x.to(gain.dtype).flatten(1, 2), dim=1, correction=0)
    mean = (mean + added).unflatten(1, (groups, -1))
    centre = mean.mean(2, keepdim=True)
    spread = (variance.unflatten(1, (groups, -1)) + (mean - centre).square()).mean(2, keepdim=True)
    scale = (gain.unflatten(0, (groups, -1)) * torch.rsqrt(spread + eps)).flatten(1)
    return scale, bias + (added - centre.expand_as(mean).flatten(1)) * scale


@fused(moving=1)
def activate_into(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> None:
    """`activated`, with the border of each frame repeated once: x [T, H, W, C] into out [T, H+2, W+2, C]."""
    frames = activated(x, scale, offset).permute(0, 3, 1, 2)
    out.copy_(F.pad(frames, (1, 1, 1, 1), mode="replicate").permute(0, 2, 3, 1))


@fused(moving=1)
def add_into(x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor) -> None:
    """x += update + bias, rounded once; x, update [T, H, W, C]."""
    x.copy_(x + (update + bias))


@fused(moving=2)
def add_band_into(band: torch.Tensor, update: torch.Tensor, bias: torch.Tensor) -> None:
    """band += update + bias, rounded once; both [T, rows, W, C], views."""
    band.copy_(band + (update + bias))


@fused(moving=2)
def sequences(band: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The norm of band [T, rows, W, C] as [rows * W, T, C]."""
    normed = (band * scale + offset).to(band.dtype)
    return normed.permute(1, 2, 0, 3).flatten(0, 1).contiguous()


@fused(moving=2)
def unit(vectors: torch.Tensor, eps: float) -> torch.Tensor:
    """Vectors [N, T, 2, heads, D] of length 1, the norm in at least float32."""
    exact = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return (exact / exact.norm(dim=-1, keepdim=True).clamp_min(eps)).to(vectors.dtype)


@fused(moving=1)
def fourier_features(pixels: torch.Tensor, waves: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pixels [T, H, W, 3] float32 -> [T, H, W, 16]: themselves, sines, cosines (15, Genmo's), one zero; rounded at the end.

    `waves` [6]: radians per unit of pixel value, two for red, two for green, two for blue.
    """
    angles = pixels.repeat_interleave(2, dim=-1) * waves
    zero = torch.zeros_like(pixels[..., :1])
    return torch.cat([pixels, angles.sin(), angles.cos(), zero], dim=-1).to(dtype)
