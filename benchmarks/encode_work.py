"""All that `mochi-lora encode` does besides the arithmetic of one clip; `encode.py --what folder text` runs it.

`folder` draws films of H.264 and sends them through `encode_clips`: read, decoded, resized, pinned, moved, encoded, written.
`clip_seconds` is the wall time of a clip among the others, `part_seconds` what each part takes alone, one clip at a time, and
`gpu_busy_share` (on a GPU) the share of the wall time in which a kernel ran. `text` embeds captions in batches, each
of as many tokens as training steps are measured with.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from encode_lines import about, buckets_of, forget_peaks, measured, our_vae, peaks, spread
from kernel_times import running
from whole_video import T5_WIDTH, MadeUpWords, random_t5

from mochi_lora.data.ahead import threads_to_read
from mochi_lora.data.cache import Cache, EncoderIdentity
from mochi_lora.data.clip_plan import Shapes
from mochi_lora.data.decode import read_clip
from mochi_lora.data.encode import EncodedClip, encode_clips
from mochi_lora.data.probe import probe
from mochi_lora.data.samples import Posterior
from mochi_lora.data.sources import ClipSource
from mochi_lora.model.text import TextEncoder
from mochi_lora.model.vae import MochiVae
from mochi_lora.spec import FRAMES_PER_SECOND, Bucket

_GRAIN = 6.0  # of 255: with it x264's bits and so the decoder's time are about those of a film
_PARTS_OF = 3  # clips whose parts are timed


def folder_lines(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A line for each size of film and each bucket."""
    readers = threads_to_read(arguments.read_ahead)
    vae = our_vae(arguments, device, arguments.precision)
    for size in arguments.films:
        width, height = map(int, size.split("x"))
        for bucket in buckets_of(arguments):
            told = about(arguments, "folder", bucket, {"film": size, "clips": arguments.clips})
            told["plan"] |= {"read_ahead": readers}
            with tempfile.TemporaryDirectory() as folder:
                films = draw_films(Path(folder), width, height, bucket.frames, arguments.clips)
                work = _Folder([ClipSource(film, "a film") for film in films], bucket, vae, readers, Path(folder), device)
                yield measured(told, work.figures)


class _Folder:
    """Films that lie on the disk, and the encoder they go through."""

    def __init__(
        self, sources: list[ClipSource], bucket: Bucket, vae: MochiVae, readers: int, folder: Path, device: torch.device
    ) -> None:
        self._sources, self._bucket, self._vae, self._readers = sources, bucket, vae, readers
        self._folder, self._device = folder, device
        self._identity = EncoderIdentity("random weights", "bf16")

    def figures(self) -> dict[str, Any]:
        """The measured fields of a line."""
        parts = self._parts()  # also what warms up
        forget_peaks(self._device)
        wall, busy = running(lambda: self._encode(Cache(self._folder / "cache")), self._device)
        a_clip = wall / len(self._sources)
        return {
            "clip_seconds": spread([a_clip]),
            "steps": len(self._sources),
            "clips_per_second": 1 / a_clip,
            "tokens_per_second": self._bucket.tokens / a_clip,
            "part_seconds": parts,
            "gpu_busy_share": busy,
            **peaks(self._device),
            "finite": True,  # else the clip would have been refused
        }

    def _encode(self, cache: Cache) -> None:
        shapes, pin = Shapes((self._bucket,), upscale=True), self._device.type == "cuda"
        outcomes = encode_clips(
            self._sources, shapes, cache, self._identity, lambda: self._vae.encode, read_ahead=self._readers, pin=pin
        )
        for outcome in outcomes:
            if not isinstance(outcome, EncodedClip):
                raise RuntimeError(outcome.reason)  # noqa: TRY004 - not a matter of types

    def _parts(self) -> dict[str, float]:
        """Seconds that each part of a clip takes alone: the least of a few, the first one warms up."""
        cache = Cache(self._folder / "parts")
        seconds: dict[str, list[float]] = {}

        def timed(part: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the part gives
            start = time.perf_counter()
            found = work()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            seconds.setdefault(part, []).append(time.perf_counter() - start)
            return found

        for number, source in enumerate(self._sources[:_PARTS_OF]):
            info = timed("probing", partial(probe, source.path))
            pixels = timed("reading", partial(read_clip, source, info, self._bucket))
            if self._device.type == "cuda":
                pixels = timed("pinning", pixels.pin_memory)
                pixels = timed("moving", partial(pixels.to, self._device, non_blocking=True))
            there = timed("encoding", partial(self._vae.encode, pixels))
            kept = timed("moving_back", partial(_on_host, there))
            timed("writing", partial(cache.write_latents, f"{number:032d}", kept, {}))
        return {part: min(found) for part, found in seconds.items()}


def _on_host(posterior: Posterior) -> Posterior:
    return Posterior(posterior.mean.cpu(), posterior.logvar.cpu())


def draw_films(folder: Path, width: int, height: int, frames: int, count: int) -> list[Path]:
    """H.264 films of `frames` frames: a soft picture that moves, under grain. Returns their paths."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (height // 16 + 8, width // 16 + 8, 3)).astype(np.uint8)
    soft = VideoFrame.from_ndarray(coarse, format="rgb24").reformat((width // 16 + 8) * 16, (height // 16 + 8) * 16, "rgb24")
    picture = soft.to_ndarray().astype(np.int16)
    grain = np.rint(draw.normal(0, _GRAIN, (height + 32, width + 32, 1))).astype(np.int16)
    paths = [folder / f"{number:04d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream(
                "libx264", rate=Fraction(FRAMES_PER_SECOND), options={"preset": "veryfast", "crf": "20"}
            )
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(frames):
                x, y = (number + 2 * index) % 128, (3 * number + index) % 128
                over = draw.integers(0, 32, 2)
                speck = grain[over[0] : over[0] + height, over[1] : over[1] + width]
                shown = np.clip(picture[y : y + height, x : x + width] + speck, 0, 255).astype(np.uint8)
                container.mux(stream.encode(VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24")))
            container.mux(stream.encode(None))
    return paths


def text_lines(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A line for each batch size; `clip_seconds` is a caption's share of its batch."""
    width = arguments.text_width or T5_WIDTH
    encoder = TextEncoder(random_t5(width, device), MadeUpWords(), width)
    for batch in arguments.text_batch:
        told = about(arguments, "text", None, {"plan": {"precision": "bf16", "text_batch": batch}, "text_width": width})
        yield measured(told, partial(_text_figures, encoder, batch, arguments, device))


def _text_figures(encoder: TextEncoder, batch: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    captions = [f"caption {number}" for number in range(arguments.clips)]
    batches = [captions[start : start + batch] for start in range(0, len(captions), batch)]
    encoder.embed(batches[0])
    forget_peaks(device)
    tokens: list[int] = []

    def embed() -> None:
        tokens.extend(len(found.tokens) for some in batches for found in encoder.embed(some))

    wall, busy = running(embed, device)
    return {
        "clip_seconds": spread([wall / len(captions)]),
        "steps": len(batches),
        "clips_per_second": len(captions) / wall,
        "tokens_per_second": sum(tokens) / wall,
        "gpu_busy_share": busy,
        **peaks(device),
        "finite": True,  # `embed` refuses others
    }
