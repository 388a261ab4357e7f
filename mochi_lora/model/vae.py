"""Mochi's VAE: pixels to posterior, raw latents to pixels. Owns its files, its precision and the size of its chunks.

A clip is worked on in chunks of time and comes out as if it had gone through whole (`model.vae_layers`): nothing here
trades the result for memory. The layers' weights come from diffusers 0.42.1 `AutoencoderKLMochi`, whose function differs
from the one Genmo trained in the decoder's first frames, on long clips (`model.vae_upstream`) and in a third place: its
`DiagonalGaussianDistribution` clamps log-variance to [-30, 20]. Genmo does not, nor does this room.
"""

from collections.abc import Iterator, Mapping
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
from mochi_lora.model.fusion import room_for_kernels
from mochi_lora.model.vae_network import Decoder, Encoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
# An activation of one chunk: 0.5 GiB in bf16, five frames of 480x848 in the decoder's widest layer, ten in the encoder's.
# By count (benchmarks/vae_floor.py), 163 frames then need 8.4 GiB to decode and 10.1 to encode; twice the chunk would need
# 3 GiB more, and save the 2 % of the memory traffic's time that go into what one chunk leaves to the next.
CHUNK_ELEMENTS = 2**28


class MochiVae:
    """Encoder and decoder on one device; never a gradient."""

    def __init__(
        self, module: AutoencoderKLMochi, *, precision: Literal["bf16", "fp32"], chunk_elements: int = CHUNK_ELEMENTS
    ) -> None:
        """Take the float32 weights of `module`, which is left alone; `load` is the usual way in.

        bf16: convolutions and matrix products are, and their weights; group norm, Fourier features and sums are computed in
        float32. fp32 is real float32, without TF32. `chunk_elements` bounds memory, not the result.
        """
        assert next(module.parameters()).dtype == torch.float32, "norms need the weights as they are, not rounded to bf16"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._precision = precision
        self._chunk_elements = chunk_elements
        self._encoder, self._decoder = Encoder(module.encoder, dtype), Decoder(module.decoder, dtype)
        self._latent_channels = module.config.latent_channels
        self.stats = _stats(module.config)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, precision: Literal["bf16", "fp32"]) -> "MochiVae":
        """Read a diffusers `vae` folder: config.json and diffusion_pytorch_model.safetensors, any float dtype.

        No random numbers are drawn. Raises UserError if the folder does not hold a complete Mochi VAE.
        """
        config = _read_config(folder)
        with torch.device("meta"):  # no time and no random numbers spent on weights that are replaced
            module = AutoencoderKLMochi.from_config(config)
        ratios = (module.temporal_compression_ratio, module.spatial_compression_ratio)
        expected = (spec.TIME_COMPRESSION, spec.SPACE_COMPRESSION)
        if ratios != expected:
            raise UserError(f"{folder}: compresses (time, space) by {ratios}, not {expected}; point at Mochi's vae folder")
        _fill(module, folder / WEIGHTS)
        return cls(module.to(device), precision=precision)

    @staticmethod
    def stats_of(folder: Path) -> LatentStats:
        """Latent statistics of a `vae` folder, without loading a weight."""
        return _stats(_read_config(folder))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._decoder.proj_in.weight.device

    def to(self, device: torch.device) -> None:
        """Move the weights, for offloading."""
        self._encoder.to(device)
        self._decoder.to(device)

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
            moments = self._encoder(pixels.to(self.device, non_blocking=True), self._chunk_elements)
        mean, logvar = moments.permute(3, 0, 1, 2).float().contiguous().chunk(2)
        return Posterior(mean, logvar)

    @torch.no_grad()
    def decode(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Pixels of one clip: [C, T, h, w] float32 in raw VAE space -> [3, 6(T-1)+1, 8h, 8w] float32, clamped to [-1, 1].

        Normalised latents must pass `stats.denormalise` first. Genmo's `decode_latents` clamps as well.
        """
        assert raw_latents.dtype == torch.float32, f"latents stay float32, got {raw_latents.dtype}"
        assert raw_latents.ndim == 4 and len(raw_latents) == self._latent_channels, (  # noqa: PT018
            f"expected [{self._latent_channels}, T, h, w], got {tuple(raw_latents.shape)}"
        )
        _, latent_frames, height, width = raw_latents.shape
        frames = (latent_frames - 1) * spec.TIME_COMPRESSION + 1
        pixels = torch.empty(3, frames, height * spec.SPACE_COMPRESSION, width * spec.SPACE_COMPRESSION, device=self.device)
        stop = 0
        with self._arithmetic():
            for chunk in self._decoder(raw_latents.to(self.device), self._chunk_elements):
                pixels[:, stop : stop + len(chunk)] = chunk.permute(3, 0, 1, 2)
                stop += len(chunk)
        assert stop == frames, (stop, frames)
        return pixels.clamp_(-1, 1)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        tf32 = torch.backends.cudnn.allow_tf32  # on by default for convolutions: 10 bits of mantissa are not fp32
        torch.backends.cudnn.allow_tf32 = tf32 and self._precision == "bf16"
        try:
            with room_for_kernels(self.device):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = tf32


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
