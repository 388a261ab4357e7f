"""Mochi's encoder and decoder over chunks of time: exact for any length and any chunk, in memory that does not follow the clip.

The decoder has no attention: it runs from latents to pixels chunk by chunk, and keeps nothing of a clip but its pixels.
The encoder streams to its first down-sampling, which leaves an eighth of the numbers; from there on the clip stands in
memory as a whole, because attention wants it, and every other layer changes it in place in chunks.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_mochi import (
    MochiDecoder3D,
    MochiDownBlock3D,
    MochiEncoder3D,
    MochiMidBlock3D,
    MochiResnetBlock3D,
)

from mochi_lora.model.vae_kernels import activated, fourier_features
from mochi_lora.model.vae_layers import Attention, Chunks, Down, Norm, Projection, Residual, Up, joined, pieces


class Encoder(torch.nn.Module):
    """Pixels to the posterior's moments; takes its weights from diffusers' encoder, convolutions in `dtype`."""

    waves: torch.Tensor

    def __init__(self, upstream: MochiEncoder3D, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        waves = [2 * torch.pi * 2**power for power in (6, 7)] * 3  # diffusers' `FourierFeatures`, for red, green and blue
        self.register_buffer("waves", upstream.proj_in.weight.new_tensor(waves))
        self.proj_in = Projection(upstream.proj_in.weight, upstream.proj_in.bias, dtype)
        assert not any(upstream.block_in.attentions), "no attention before the first down-sampling: that part is streamed"
        self.block_in = Residuals(upstream.block_in.resnets, dtype)
        self.windows = tuple(block.temporal_expansion for block in upstream.down_blocks)
        self.downs = torch.nn.ModuleList(Down(block.conv_in.conv, dtype) for block in upstream.down_blocks)
        self.levels = torch.nn.ModuleList(_Level(block, dtype) for block in (*upstream.down_blocks, upstream.block_out))
        self.norm_out = Norm(upstream.norm_out)
        self.proj_out = Projection(upstream.proj_out.weight, upstream.proj_out.bias, dtype)

    def forward(self, pixels: torch.Tensor, elements: int) -> torch.Tensor:
        """[3, F, H, W] float32 in [-1, 1] -> [T, H/8, W/8, 2C], mean and log-variance; F - 1 is a multiple of 6.

        `elements` bounds a chunk's activation, and with it the memory; it has no influence on the result.
        """
        chunks = self.block_in(self._entered(pixels, elements))
        frames = pixels.shape[1]
        for window, down, level in zip(self.windows, self.downs, self.levels[:-1], strict=True):
            frames = (frames - 1) // window + 1
            clip = joined(down(chunks), frames)
            level(clip, elements)
            chunks = iter(pieces(clip, elements))
        self.levels[-1](clip, elements)
        scale, offset = self.norm_out(clip, torch.zeros_like(self.norm_out.bias))
        return self.proj_out(activated(clip, scale, offset))

    def _entered(self, pixels: torch.Tensor, elements: int) -> Chunks:
        frames = max(1, elements // (self.proj_in.channels * pixels[0, 0].numel()))
        for part in pixels.split(frames, dim=1):
            yield self.proj_in(fourier_features(part.permute(1, 2, 3, 0), self.waves, self.dtype))


class Decoder(torch.nn.Module):
    """Latents to pixels; takes its weights from diffusers' decoder, convolutions in `dtype`."""

    def __init__(self, upstream: MochiDecoder3D, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.proj_in = Projection(upstream.conv_in.weight.flatten(1), upstream.conv_in.bias, dtype)
        blocks = (upstream.block_in, *upstream.up_blocks)
        self.levels = torch.nn.ModuleList(Residuals(block.resnets, dtype) for block in blocks)
        self.ups = torch.nn.ModuleList(Up(block, dtype) for block in upstream.up_blocks)
        self.block_out = Residuals(upstream.block_out.resnets, dtype)
        self.proj_out = Projection(upstream.proj_out.weight, upstream.proj_out.bias, dtype)

    def forward(self, latents: torch.Tensor, elements: int) -> Chunks:
        """[C, T, h, w] raw -> chunks of [., 8h, 8w, 3], 6 (T - 1) + 1 frames in all; `elements` as for the encoder."""
        clip = self.proj_in(latents.permute(1, 2, 3, 0).to(self.dtype))
        chunks = self.levels[0](iter(pieces(clip, elements)))
        for up, residuals in zip(self.ups, self.levels[1:], strict=True):
            chunks = up(residuals(chunks), elements)
        for chunk in self.block_out(chunks):
            yield self.proj_out(F.silu(chunk, inplace=True))


class Residuals(torch.nn.Module):
    """Residual layers one behind the other."""

    def __init__(self, resnets: Iterable[MochiResnetBlock3D], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Residual(resnet, dtype) for resnet in resnets)

    def forward(self, chunks: Chunks) -> Chunks:
        """Each chunk [T, H, W, C], changed in place by all layers before the next is asked for."""
        for layer in self.layers:
            chunks = layer(chunks)
        return chunks


class _Level(torch.nn.Module):
    """Residual layers, each with its attention, over a whole clip in place."""

    def __init__(self, block: MochiDownBlock3D | MochiMidBlock3D, dtype: torch.dtype) -> None:
        super().__init__()
        self.residuals = Residuals(block.resnets, dtype)
        pairs = zip(block.norms, block.attentions, strict=True)
        self.attentions = torch.nn.ModuleList(Attention(norm, attention, dtype) for norm, attention in pairs)

    def forward(self, clip: torch.Tensor, elements: int) -> None:
        """Changes the clip [T, H, W, C]."""
        for residual, attention in zip(self.residuals.layers, self.attentions, strict=True):
            for _ in residual(pieces(clip, elements)):
                pass
            attention(clip, elements)
