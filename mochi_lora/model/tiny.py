"""A Mochi small enough for a laptop: random weights, true architecture, full diffusers folder, about 5 MB.

Every number is chosen to keep what matters of the real one: text stream half as wide as the visual one, heads divisible
by 2, 3 and 6, linear dimensions that quantisation kernels accept, 8 x 8 x 6 compression into 12 channels, the real latent
statistics, T5's token ids, and bf16 storage with float32 positions and norms. It has learned nothing; it can learn.
"""

import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from mochi_lora import spec
from mochi_lora.data.whole_folder import write_whole
from mochi_lora.model.base import TINY_MARKER
from mochi_lora.model.weights import random_transformer

TEXT_WIDTH = 64
# 6 x 32 = 192 wide. Text stream 96 as 3072 : 1536 in the real one; 8/3 x 192 and 8/3 x 96 make the feed-forwards 512 and
# 256 wide, whereas 64 would give 170, which no 8-bit or 4-bit kernel takes.
TRANSFORMER: dict[str, Any] = {
    "patch_size": spec.PATCH,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_layers": 2,
    "pooled_projection_dim": 96,
    "in_channels": spec.LATENT_CHANNELS,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 64,
    "max_sequence_length": spec.TEXT_TOKENS,
}
_VAE_CHANNELS = (32, 32, 32, 32)  # group norm has 32 groups: the least there is
_VERSION = 2
_CAPTIONS = """
a lighthouse on a cliff at dusk, waves breaking below
a watercolor painting of a fox running through the snow
a video of a dog playing with a red ball on green grass
two people walk along the street at night in the rain
close up of a woman with long hair looking at the camera, soft light
an old man drinks coffee and reads the paper in a small kitchen
slow motion of water pouring into a clear glass on a white table
a bird flying over mountains, clouds moving fast, wide shot
a car drives down a long road in the desert under blue sky
a cat sits by the window and turns its head to the left
the camera pans right across a city with tall buildings
a child in a yellow coat jumps into the water
flowers moving in the wind, black and white film, high quality
a train arrives at the station, the doors open, people get off
hands cut bread with a knife on a wooden board
a boat on the sea at sunrise, orange and pink sky, in the style of an oil painting
fire burning in the dark forest, smoke rising, stars above
a horse runs across a field, trees in the background
snow falls on a quiet house, warm light in the windows
an astronaut floats in space, the earth turns slowly behind her
"""


def build_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny Mochi of random weights under `folder` and return it; the same seed writes the same bytes.

    Stock `MochiPipeline.from_pretrained(folder)` loads it. The global random state is left alone. A folder which already
    holds the tiny model of this seed is returned as it is; any other non-empty folder raises UserError.
    """

    def fill(draft: Path) -> None:
        transformers_logging.disable_progress_bar()
        _pipeline(seed).save_pretrained(draft)

    marker = {"version": _VERSION, "seed": seed}
    return write_whole(folder, marker=TINY_MARKER, content=marker, what=f"the tiny model of seed {seed}", fill=fill)


def _pipeline(seed: int) -> MochiPipeline:
    tokenizer = word_tokenizer(word.strip(",") for word in _CAPTIONS.split())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = tiny_text_encoder(len(tokenizer)).eval()
        vae = _vae()
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, invert_sigmas=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=_transformer(seed),
    )


def _transformer(seed: int) -> MochiTransformer3DModel:
    return random_transformer(TRANSFORMER, device=torch.device("cpu"), precision="bf16", seed=seed)


@torch.no_grad()
def _vae() -> AutoencoderKLMochi:
    """Random, but with a posterior like a trained one's: means of unit scale, logvar near -6, not noise over noise."""
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=_VAE_CHANNELS, decoder_block_out_channels=_VAE_CHANNELS, layers_per_block=(1, 1, 1, 1, 1)
    )
    # The last linear has no bias. SiLU(n + 2) is about 1.85 +- 1 for normal n: a constant row makes a constant of it.
    vae.encoder.norm_out.norm_layer.bias.fill_(2.0)
    means, logvars = vae.encoder.proj_out.weight.chunk(2)
    means.sub_(means.mean(1, keepdim=True)).mul_(means.shape[1] ** -0.5 / means.std())
    logvars.fill_(-6.0 / (1.85 * logvars.shape[1]))
    return torch.nn.Module.to(vae, torch.bfloat16)  # diffusers' own `to` warns about an empty list of fp32 modules


def tiny_text_encoder(tokens: int) -> T5EncoderModel:
    """Two layers of T5 v1.1, freshly initialised, float32, without dropout. Draws from torch's global generator."""
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


def word_tokenizer(words: Iterable[str]) -> T5Tokenizer:
    """Whole words, letters for the rest; ids 0 to 3 are T5's: <pad>, </s>, <unk>, space."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(f"\u2581{word}", -5.0) for word in sorted(set(words))]
    vocabulary += [(letter, -8.0) for letter in string.ascii_letters + string.digits + ".,;:!?'\"()-"]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=spec.TEXT_TOKENS)
