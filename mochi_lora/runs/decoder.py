"""The VAE as the commands decode with it."""

import torch

from mochi_lora.config.schema import Config
from mochi_lora.model.base import locate
from mochi_lora.model.vae import MochiVae


def load_decoder(config: Config, device: torch.device, *, rests_on: torch.device | None = None) -> MochiVae:
    """The base's VAE for work on `device`; under offloading it rests elsewhere until it is needed."""
    return MochiVae.load(
        locate(config.model.base, config.model.revision, "vae"),
        device=rests_on or device,
        precision="bf16" if device.type == "cuda" else "fp32",
    )
