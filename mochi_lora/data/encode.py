"""Clips to cached latents, read ahead and written behind in threads. What fails stays one clip's failure; disk and
memory are everybody's.

The encoder is injected: this room knows footage and cache, no model.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

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

Result = TypeVar("Result")

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

    `read_ahead` threads read the clips that follow while one is encoded; at most `read_ahead` + 1 clips lie in memory. With
    them comes a thread that writes a clip while the next is encoded, and a clip's outcome comes when the next is encoded.
    `pin` puts pixels into page-locked memory, from where they reach a GPU in a tenth of the time. An entry is in the
    cache before its outcome is given out, so a kill loses the clips at work and those read ahead, nothing that was told.

    Full disks, out-of-memory and GPU errors, and a `UserError` about the encoder itself are raised at once: the next clip
    would fail as well.
    """
    read = partial(_read, shapes=shapes, files=KnownFiles(), cache=cache, vae=vae, pin=pin)
    with closing(begun_ahead(read, sources, read_ahead)) as ready, closing(_Writer(cache, aside=read_ahead > 0)) as writer:
        before: Callable[[], EncodedClip | Rejection] | None = None
        for source in sources:
            reading = next(ready)
            this = _begun(source, reading, writer, encoder)
            del reading  # and its pixels, before another clip is read
            if read_ahead == 0:
                yield this()
                continue
            if before is not None:
                yield before()
            before = this
        if before is not None:
            yield before()


class _Writer:
    """Puts entries into the cache, in a thread of its own (`aside`) or in the call."""

    def __init__(self, cache: Cache, *, aside: bool) -> None:
        self._cache = cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer") if aside else None
        self._last: tuple[str, Future[None]] | None = None

    def holds(self, key: str) -> bool:
        """Whether the entry is in the cache; one that is just being written is waited for."""
        if self._last is not None and self._last[0] == key:
            wait([self._last[1]])
        return self._cache.holds("latents", key)

    def begin(self, key: str, posterior: Posterior, about: dict[str, Any]) -> Callable[[], None]:
        """A call that returns when the entry is in the cache, or raises why it is not."""
        if self._thread is None:
            return partial(self._write, key, posterior, about)
        self._last = key, self._thread.submit(self._write, key, posterior, about)
        return self._last[1].result

    def close(self) -> None:
        """Finish what was begun."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _write(self, key: str, posterior: Posterior, about: dict[str, Any]) -> None:
        with out_of_space_named(self._cache.path("latents", key)):
            self._cache.write_latents(key, posterior, about)


def _begun(
    source: ClipSource, read: Callable[[], _Read], writer: _Writer, encoder: Callable[[], LatentEncoder]
) -> Callable[[], EncodedClip | Rejection]:
    """Encode one clip and begin to write it; the call waits until it is written."""
    written = _bounded(source, lambda: _encoded(source, read(), writer, encoder))
    return partial(_bounded, source, written) if callable(written) else lambda: written


def _bounded(source: ClipSource, work: Callable[[], Result]) -> Result | Rejection:
    """The boundary: what goes wrong with one clip ends here."""
    try:
        return work()
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


def _encoded(
    source: ClipSource, clip: _Read, writer: _Writer, encoder: Callable[[], LatentEncoder]
) -> Callable[[], EncodedClip]:
    # Asked again: the same clip under another name may have been written since it was read.
    was_cached = clip.pixels is None or writer.holds(clip.key)
    outcome = EncodedClip(source, clip.digest, clip.bucket, clip.key, clip.unused_seconds, was_cached)
    if clip.pixels is None or was_cached:
        return lambda: outcome
    posterior = encoder()(clip.pixels)
    posterior = Posterior(posterior.mean.cpu(), posterior.logvar.cpu())
    if not bool(torch.isfinite(posterior.mean).all() and torch.isfinite(posterior.logvar).all()):
        message = "the VAE gave a non-finite latent; set encode.vae_precision: fp32"
        raise ClipError(message)
    about = {"source": source.name, "sha256": clip.digest, "start": source.start, "bucket": str(clip.bucket)}
    written = writer.begin(clip.key, posterior, about)

    def finished() -> EncodedClip:
        written()
        return outcome

    return finished
