"""Clips to cached latents, one at a time. What fails stays one clip's failure; disk and memory are everybody's.

The encoder is injected: this room knows footage and cache, no model.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from mochi_lora.data.cache import Cache, ClipRange, EncoderIdentity, latents_key
from mochi_lora.data.decode import read_clip
from mochi_lora.data.geometry import choose_bucket
from mochi_lora.data.probe import probe
from mochi_lora.data.samples import Posterior
from mochi_lora.data.sources import ClipSource, Rejection
from mochi_lora.errors import ClipError, UserError
from mochi_lora.files import out_of_space_named, sha256_of_file
from mochi_lora.spec import FRAMES_PER_SECOND, Bucket

Status = Literal["kept", "trimmed"]
# torch has an error class for a full GPU only; on the host, and inside cuBLAS, memory ends in a plain RuntimeError.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")


class LatentEncoder(Protocol):
    """Pixels [3, F, H, W] float32 in [-1, 1] -> posterior in raw VAE space."""

    def __call__(self, pixels: torch.Tensor) -> Posterior:
        """Encode one clip."""
        ...


@dataclass(frozen=True)
class EncodedClip:
    """One clip that is in the cache."""

    source: ClipSource
    source_sha256: str
    bucket: Bucket
    key: str
    unused_seconds: float
    was_cached: bool

    @property
    def status(self) -> Status:
        """Trimmed if more than one frame's time at the end is not used."""
        return "trimmed" if self.unused_seconds > 1 / FRAMES_PER_SECOND else "kept"


@dataclass(frozen=True)
class Shapes:
    """What clips may become."""

    buckets: tuple[Bucket, ...]
    upscale: bool


def encode_clips(
    sources: Iterable[ClipSource],
    shapes: Shapes,
    cache: Cache,
    vae: EncoderIdentity,
    encoder: Callable[[], LatentEncoder],
) -> Iterator[EncodedClip | Rejection]:
    """Encode each source into `cache`, or explain why not. `encoder()` is only called when something is missing.

    Full disks, out-of-memory and GPU errors, and a `UserError` about the encoder itself are raised at once: the next clip
    would fail as well.
    """
    for source in sources:
        try:
            yield _encode_clip(source, shapes, cache, vae, encoder)
        except ClipError as error:
            yield Rejection(source.name, _without_name(str(error), source))
        except (UserError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if any(words in str(error) for words in _OUT_OF_MEMORY):
                raise
            yield Rejection(source.name, f"{type(error).__name__}: {error}")


def _encode_clip(
    source: ClipSource, shapes: Shapes, cache: Cache, vae: EncoderIdentity, encoder: Callable[[], LatentEncoder]
) -> EncodedClip:
    info = probe(source.path)
    bucket = choose_bucket(info, source, shapes.buckets, upscale=shapes.upscale)
    digest = sha256_of_file(source.path)
    key = latents_key(ClipRange(digest, source.start, source.end, info.width, info.height, bucket), vae)
    end = info.duration if source.end is None else min(source.end, info.duration)
    unused = 0.0 if info.is_image else max(0.0, end - source.start - bucket.frames / FRAMES_PER_SECOND)
    was_cached = cache.holds("latents", key)
    if not was_cached:
        posterior = encoder()(read_clip(source, info, bucket))
        if not bool(torch.isfinite(posterior.mean).all() and torch.isfinite(posterior.logvar).all()):
            message = "the VAE gave a non-finite latent; set encode.vae_precision: fp32"
            raise ClipError(message)
        about = {"source": source.name, "sha256": digest, "start": source.start, "bucket": str(bucket)}
        with out_of_space_named(cache.path("latents", key)):
            cache.write_latents(key, posterior, about)
    return EncodedClip(source, digest, bucket, key, unused, was_cached)


def _without_name(message: str, source: ClipSource) -> str:
    """The report has a column for the name."""
    return message.removeprefix(f"{source.name}: ").removeprefix(f"{source.path}: ")


def validation_sources(digests: Iterable[str], fraction: float) -> set[str]:
    """SHA-256 of the source files that are held out: `fraction` of them, rounded, one at least if any are asked for.

    The smallest digests are taken, so adding a clip moves few others across. A source is never on both sides, and a
    single source is never held out.
    """
    known = sorted(set(digests))
    if fraction == 0 or len(known) < 2:
        return set()
    return set(known[: min(len(known) - 1, max(1, round(fraction * len(known))))])
