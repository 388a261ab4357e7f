"""Mochi's VAE: pixels to posterior, raw latents to pixels. Owns how time is chunked, Genmo's frame dropping, precision, tiling.

diffusers 0.42.1 `AutoencoderKLMochi` holds the layers. Three things in it differ from the model Genmo trained
(genmoai/mochi @0c86aeb `vae/models.py`); all are mended here, none of them by an option of diffusers':

- The decoder. Genmo drops the surplus leading frames after *each* temporal up-sampling, so later convolutions never see
  them. diffusers keeps them and drops all at the end: the first frames differ.
- The encoder on long clips. diffusers cuts the input of a large convolution along time, with an overlap that suits
  stride 1 only. In a strided one the second part may start in the middle of a window: at 163x480x848 every frame after the
  81st enters shifted by one. Genmo never cuts a strided convolution.
- log-variance. `DiagonalGaussianDistribution` clamps it to [-30, 20]; Genmo does not.

Time is not chunked: a clip goes through whole, as in training of the VAE.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLMochi
from safetensors import SafetensorError
from safetensors.torch import load_file

from mochi_lora import spec
from mochi_lora.data.samples import Posterior
from mochi_lora.errors import UserError
from mochi_lora.model.flow import LatentStats

WEIGHTS = "diffusion_pytorch_model.safetensors"
_PART_ELEMENTS = 2**30  # per convolution call, as upstream: cuDNN indexes with 32 bits


class MochiVae:
    """Encoder and decoder on one device; weights in float32 whatever the precision, gradients never."""

    def __init__(self, module: AutoencoderKLMochi, *, precision: Literal["bf16", "fp32"], tiling: bool = False) -> None:
        """Take over `module` and mend it (see the top of this file); `load` is the usual way in."""
        assert next(module.parameters()).dtype == torch.float32, "the VAE's weights stay float32, precision is autocast's"
        self._module = module.requires_grad_(requires_grad=False).eval()
        self._precision = precision
        self.stats = _stats(module.config)
        _drop_frames_where_genmo_does(module)
        _cut_strided_convolutions_between_windows(module)
        if tiling:
            module.enable_tiling()

    @classmethod
    def load(
        cls, folder: Path, *, device: torch.device, precision: Literal["bf16", "fp32"], tiling: bool = False
    ) -> "MochiVae":
        """Read a diffusers `vae` folder: config.json and diffusion_pytorch_model.safetensors, any float dtype.

        `precision` bf16 is autocast over float32 weights; fp32 is real float32, without TF32. `tiling` affects decoding
        only: a tiled *encode* is another function than the one Mochi was trained with. No random numbers are drawn.
        Raises UserError if the folder does not hold a complete Mochi VAE.
        """
        config = _read_config(folder)
        with torch.device("meta"):  # no time and no random numbers spent on weights that are replaced
            module = AutoencoderKLMochi.from_config(config)
        ratios = (module.temporal_compression_ratio, module.spatial_compression_ratio)
        expected = (spec.TIME_COMPRESSION, spec.SPACE_COMPRESSION)
        if ratios != expected:
            raise UserError(f"{folder}: compresses (time, space) by {ratios}, not {expected}; point at Mochi's vae folder")
        _fill(module, folder / WEIGHTS)
        return cls(module.to(device), precision=precision, tiling=tiling)

    @staticmethod
    def stats_of(folder: Path) -> LatentStats:
        """Latent statistics of a `vae` folder, without loading a weight."""
        return _stats(_read_config(folder))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._module.parameters()).device

    def to(self, device: torch.device) -> None:
        """Move the weights, for offloading."""
        self._module.to(device)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> Posterior:
        """Posterior of one clip: pixels [3, F, H, W] float32 in [-1, 1] -> mean, logvar [C, T, H/8, W/8] float32.

        F is 6k+1, H and W are multiples of 16, else ValueError: the layers themselves would drop the tail silently.
        The result is in raw VAE space, on the VAE's device, its logvar not clamped. Pixels must never have been bf16: the
        Fourier features multiply them by up to 256 pi, and 8 bits of mantissa leave only noise.
        """
        assert pixels.dtype == torch.float32, f"pixels must reach the VAE in float32, got {pixels.dtype}"
        channels, frames, height, width = pixels.shape
        assert channels == 3, f"expected [3, F, H, W], got {tuple(pixels.shape)}"
        spec.Bucket(frames, height, width)
        with self._arithmetic():
            # Not `module.encode`: it would tile when decoding is to be tiled, and clamp logvar.
            moments, _ = self._module.encoder(pixels.to(self.device).unsqueeze(0))
        mean, logvar = moments[0].float().chunk(2)
        return Posterior(mean, logvar)

    @torch.no_grad()
    def decode(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Pixels of one clip: [C, T, h, w] float32 in raw VAE space -> [3, 6(T-1)+1, 8h, 8w] float32, clamped to [-1, 1].

        Normalised latents must pass `stats.denormalise` first. Genmo's `decode_latents` clamps as well.
        """
        channels = self._module.config.latent_channels
        assert raw_latents.dtype == torch.float32, f"latents stay float32, got {raw_latents.dtype}"
        assert raw_latents.shape[:-3] == (channels,), f"expected [{channels}, T, h, w], got {tuple(raw_latents.shape)}"
        with self._arithmetic():
            pixels = self._module.decode(raw_latents.to(self.device).unsqueeze(0)).sample
        return pixels[0].float().clamp_(-1, 1)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        tf32 = torch.backends.cudnn.allow_tf32  # on by default for convolutions: 10 bits of mantissa are not fp32
        torch.backends.cudnn.allow_tf32 = tf32 and self._precision == "bf16"
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = tf32


def _drop_frames_where_genmo_does(module: AutoencoderKLMochi) -> None:
    """After each up-block of temporal expansion e, drop e-1 leading frames (`DepthToSpaceTime`); nothing at the end.

    Hooks sit on the blocks, so every tile of a tiled decode is treated alike.
    """

    def dropping(surplus: int) -> Callable[..., tuple[torch.Tensor, Any]]:
        def drop(_block: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
            hidden, cache = output
            return hidden[:, :, surplus:], cache

        return drop

    for block, expansion in zip(module.decoder.up_blocks, reversed(module.config.temporal_expansions), strict=True):
        block.register_forward_hook(dropping(expansion - 1))
    module.drop_last_temporal_frames = False


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


def _cut_strided_convolutions_between_windows(module: AutoencoderKLMochi) -> None:
    """Put `_WindowConv3d` in place of the encoder's down-sampling convolutions; weights and their names stay."""
    for block in module.encoder.down_blocks:
        block.conv_in.conv = _WindowConv3d(block.conv_in.conv)


def _stats(config: Mapping[str, Any]) -> LatentStats:
    return LatentStats(tuple(config["latents_mean"]), tuple(config["latents_std"]), config["scaling_factor"])


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected the `vae` folder of a Mochi model in diffusers layout")
    config = AutoencoderKLMochi.load_config(folder, local_files_only=True)
    if (found := config.get("_class_name")) != "AutoencoderKLMochi":
        raise UserError(f"{folder / 'config.json'}: is a {found}, expected AutoencoderKLMochi; point at Mochi's vae folder")
    return config


def _fill(module: AutoencoderKLMochi, path: Path) -> None:
    """Give the meta `module` the float32 weights in `path`: every one of them, none left over."""
    advice = "download the model's vae folder again"
    if not path.is_file():
        raise UserError(f"{path}: not there; {advice}")
    try:
        weights = {name: weight.float() for name, weight in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); {advice}") from error
    expected = module.state_dict()
    if unlike := sorted(name for name in expected if name not in weights or weights[name].shape != expected[name].shape):
        raise UserError(f"{path}: {len(unlike)} weights are missing or of another shape, the first is {unlike[0]}; {advice}")
    if surplus := sorted(weights.keys() - expected.keys()):
        raise UserError(f"{path}: {len(surplus)} weights are not the VAE's, the first is {surplus[0]}; {advice}")
    module.load_state_dict(weights, assign=True)
