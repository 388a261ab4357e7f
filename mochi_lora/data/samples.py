"""What passes between the rooms: posterior, text embedding, cached sample. Frozen, with shapes; nothing else lives here.

Shape legend: C = 12 latent channels, T = latent frames, H, W = latent cells (pixels / 8), L = valid text tokens, D = T5 width.
"""

from dataclasses import dataclass

import torch

from mochi_lora.spec import Bucket


@dataclass(frozen=True)
class Posterior:
    """The VAE's answer for one clip, in raw VAE space (not normalised: `model.flow` does that, once, on read)."""

    mean: torch.Tensor  # [C, T, H, W]
    logvar: torch.Tensor  # [C, T, H, W], natural logarithm of the variance, not clamped (Genmo does not clamp)


@dataclass(frozen=True)
class TextEmbedding:
    """T5's answer for one caption, padding cut off. L = 0 is the null prompt (Genmo masks every token of it)."""

    tokens: torch.Tensor  # [L, D], 0 <= L <= 256

    @property
    def length(self) -> int:
        """Number of valid tokens."""
        return int(self.tokens.shape[0])


@dataclass(frozen=True)
class CachedSample:
    """One training item as it stands in the cache."""

    clip: str  # name for people: path of the source, with its start time if it has one
    bucket: Bucket
    posterior: Posterior
    text: TextEmbedding
