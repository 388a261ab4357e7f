"""mochi-tiny's architecture: the real classes at sizes that make under 10 MB together.

Text encoder and tokenizer are built as for the tiny model of random weights (`model.tiny`).

Heads are a multiple of 6 and every linear of the transformer's blocks a multiple of 64 wide (192 = 6 x 32 = 3 x 64,
feed-forward 8/3 x 192 = 512), so that parallel and quantised modes can be tried on it.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

from mochi_lora import spec
from mochi_lora.model.tiny import TEXT_WIDTH

TRANSFORMER: dict[str, Any] = {
    "patch_size": spec.PATCH,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_layers": 3,
    "pooled_projection_dim": 192,
    "in_channels": spec.LATENT_CHANNELS,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 64,
    "max_sequence_length": spec.TEXT_TOKENS,
}
# Group norm has 32 groups, and a group of one channel would forget how bright a frame is: the last level has two.
VAE: dict[str, Any] = {
    "encoder_block_out_channels": (32, 32, 32, 64),
    "decoder_block_out_channels": (32, 32, 32, 64),
    "layers_per_block": (1, 1, 1, 1, 1),
}
# Frequencies per axis (time, height, width). At 64x96 pixels neighbouring tokens lie 39 units of position apart in space:
# with the real model's frequencies every token would look alike to a fresh network.
_FREQUENCY_STD = (0.5, 0.02, 0.02)


def new_transformer() -> MochiTransformer3DModel:
    """Freshly initialised, float32. Draws from torch's global generator."""
    transformer = MochiTransformer3DModel(**TRANSFORMER)
    with torch.no_grad():
        transformer.pos_frequencies.normal_()
        transformer.pos_frequencies.mul_(torch.tensor(_FREQUENCY_STD).view(3, 1, 1))
    return transformer


def new_vae() -> AutoencoderKLMochi:
    """Freshly initialised, float32. Draws from torch's global generator."""
    return AutoencoderKLMochi(**VAE)
