"""Clips to cached latents, read ahead in threads. What fails stays one clip's failure; disk and memory are everybody's.

The encoder is injected: this room knows footage and cache, no model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from mochi_lora.data.ahead import begun_ahead
from mochi_lora.data.cache import Cache, ClipRange, EncoderIdentity, latents_key
from mochi_lora.data.clip_plan import Shapes, Status, plan_clip, status_of
from mochi_lora.data.decode import read_clip
from mochi_lora.data.known_files import KnownFiles
from mochi_lora.data.samples import Posterior
from mochi_lora.data.sources import ClipSource, Rejection
from mochi_lora.errors import ClipError, UserError
from mochi_lora.files import out_of_space_named
from mochi_lora.spec import Bucket

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
        return status_of(self.unused_seconds)


@dataclass(frozen=True)
class _Read:
    """One clip ready for the VAE; without pixels if it is in the cache."""

    bucket: Bucket
    digest: str
    key: str
    unused_seconds: float
    pixels: torch.Tensor | None  # [3, F, H, W] float32


def encode_clips(
    sources: Sequence[ClipSource],
    shapes: Shapes,
    cache: Cache,
    vae: EncoderIdentity,
    encoder: Callable[[], LatentEncoder],
    *,
    read_ahead: int = 0,
    pin: bool = False,
) -> Iterator[EncodedClip | Rejection]:
    """Encode each source into `cache`, or explain why not, in order. `encoder()` is only called when something is missing.

    `read_ahead` threads read the clips that follow while one is encoded; at most `read_ahead` + 1 clips lie in memory.
    `pin` puts pixels into page-locked memory, from where they reach a GPU in a tenth of the time. An entry is in the
    cache before its outcome is given out, so a kill loses the clip at work and those read ahead, nothing that was told.

    Full disks, out-of-memory and GPU errors, and a `UserError` about the encoder itself are raised at once: the next clip
    would fail as well.
    """
    read = partial(_read, shapes=shapes, files=KnownFiles(), cache=cache, vae=vae, pin=pin)
    with closing(begun_ahead(read, sources, read_ahead)) as ready:
        for source in sources:
            wait = next(ready)
            outcome = _outcome(source, wait, cache, encoder)
            del wait  # and the pixels with it, before another clip is read
            yield outcome


def _outcome(
    source: ClipSource, wait: Callable[[], _Read], cache: Cache, encoder: Callable[[], LatentEncoder]
) -> EncodedClip | Rejection:
    """The boundary: what goes wrong with one clip ends here."""
    try:
        return _encoded(source, wait(), cache, encoder)
    except ClipError as error:
        return Rejection.of(source, error)
    except (UserError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        return Rejection(source.name, f"{type(error).__name__}: {error}")


def _read(source: ClipSource, *, shapes: Shapes, files: KnownFiles, cache: Cache, vae: EncoderIdentity, pin: bool) -> _Read:
    file = files(source.path)
    plan = plan_clip(source, file.info, shapes)
    digest = file.sha256
    clip = ClipRange(digest, source.start, source.end, plan.width, plan.height, plan.bucket, source.crop)
    key = latents_key(clip, vae)
    pixels = None if cache.holds("latents", key) else read_clip(source, file.info, plan.bucket)
    if pin and pixels is not None:
        pixels = pixels.pin_memory()
    return _Read(plan.bucket, digest, key, plan.unused_seconds, pixels)


def _encoded(source: ClipSource, clip: _Read, cache: Cache, encoder: Callable[[], LatentEncoder]) -> EncodedClip:
    # Asked again: the same clip under another name may have been written since it was read.
    was_cached = clip.pixels is None or cache.holds("latents", clip.key)
    if clip.pixels is not None and not was_cached:
        posterior = encoder()(clip.pixels)
        if not bool(torch.isfinite(posterior.mean).all() and torch.isfinite(posterior.logvar).all()):
            message = "the VAE gave a non-finite latent; set encode.vae_precision: fp32"
            raise ClipError(message)
        about = {"source": source.name, "sha256": clip.digest, "start": source.start, "bucket": str(clip.bucket)}
        with out_of_space_named(cache.path("latents", clip.key)):
            cache.write_latents(clip.key, posterior, about)
    return EncodedClip(source, clip.digest, clip.bucket, clip.key, clip.unused_seconds, was_cached)
