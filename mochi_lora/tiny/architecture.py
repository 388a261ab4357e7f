"""mochi-tiny's architecture: the real classes at sizes that make under 10 MB together, and its tokenizer.

Heads are a multiple of 6 and every linear of the transformer's blocks a multiple of 64 wide (192 = 6 x 32 = 3 x 64,
feed-forward 8/3 x 192 = 512), so that parallel and quantised modes can be tried on it.
"""

import string
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from mochi_lora import spec

TEXT_WIDTH = 64
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


def new_text_encoder(tokens: int) -> T5EncoderModel:
    """Two layers of T5 v1.1, freshly initialised, float32. Draws from torch's global generator."""
    config = T5Config(
        vocab_size=-(-tokens // 64) * 64,  # more rows than tokens, like the real one (32128 for 32100)
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def new_tokenizer(words: Iterable[str]) -> T5Tokenizer:
    """Whole words, letters for the rest; ids 0 to 3 are T5's: <pad>, </s>, <unk>, space."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(f"\u2581{word}", -5.0) for word in sorted(set(words))]
    vocabulary += [(letter, -8.0) for letter in string.ascii_letters + string.digits + ".,;:!?'\"()-"]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=spec.TEXT_TOKENS)
