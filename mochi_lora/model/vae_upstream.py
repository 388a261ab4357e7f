"""diffusers' Mochi VAE mended in place, whole clips at a time: what is trained (mochi-tiny's) and what ours is held against.

Two things in diffusers 0.42.1 `AutoencoderKLMochi` differ from the model Genmo trained (genmoai/mochi @0c86aeb
`vae/models.py`); neither is an option of diffusers':

- The decoder. Genmo drops the surplus leading frames after *each* temporal up-sampling, so later convolutions never see
  them. diffusers keeps them and drops all at the end: the first frames differ.
- The encoder on long clips. diffusers cuts the input of a large convolution along time, with an overlap that suits
  stride 1 only. In a strided one the second part may start in the middle of a window: at 163x480x848 every frame after the
  81st enters shifted by one. Genmo never cuts a strided convolution.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLMochi

_PART_ELEMENTS = 2**30  # per convolution call, as upstream: cuDNN indexes with 32 bits


def mend(module: AutoencoderKLMochi) -> None:
    """Make `module.encoder` and `module.decoder` compute what Genmo's do; weights and their names stay.

    What is left of diffusers' difference is `module.encode`'s clamp on the log-variance: call `module.encoder` instead.
    """
    for block, expansion in zip(module.decoder.up_blocks, reversed(module.config.temporal_expansions), strict=True):
        block.register_forward_hook(_dropping(expansion - 1))
    module.drop_last_temporal_frames = False
    for block in module.encoder.down_blocks:
        block.conv_in.conv = _WindowConv3d(block.conv_in.conv)


def _dropping(surplus: int) -> Callable[..., tuple[torch.Tensor, Any]]:
    """After an up-block of temporal expansion e, drop e-1 leading frames (Genmo's `DepthToSpaceTime`)."""

    def drop(_block: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        hidden, cache = output
        return hidden[:, :, surplus:], cache

    return drop


class _WindowConv3d(torch.nn.Module):
    """A convolution whose stride in time equals its kernel: windows are independent, so cuts belong between them."""

    def __init__(self, conv: torch.nn.Conv3d) -> None:
        super().__init__()
        assert (conv.stride[0], conv.padding, conv.dilation) == (conv.kernel_size[0], (0, 0, 0), (1, 1, 1))
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, C, F, H, W] -> [B, C', F/e, H/s, W/s]; F is a multiple of the window e, the causal padding included."""
        window = self.stride[0]
        windows_per_part = max(1, _PART_ELEMENTS // hidden[:, :, :window].numel())
        convolve = torch.nn.functional.conv3d
        parts = hidden.split(windows_per_part * window, dim=2)
        return torch.cat([convolve(part, self.weight, self.bias, self.stride) for part in parts], dim=2)
