"""One clip as a file of its own that reads back as the very same frames.

A clip that is a whole file is copied, byte for byte. A range or a crop becomes H.264 without loss, in RGB (libx264rgb at
quantiser 0), from the frames as they are shown: upright, whole lines, square pixels, SDR. Nothing of what made them so has
to survive in tags, and no colour conversion comes between; a file takes about a third of its raw frames. Time stamps keep
1/360000 s, in which every usual frame rate is a whole number. Each file is read back and compared before it gets its name,
as `encode` reads it and with decord, which many other trainers read with and which has an FFmpeg of its own.
"""

import os
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from threading import get_ident

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from PIL import Image

from mochi_lora.data.clip_plan import ClipPlan, Shapes, plan_clip
from mochi_lora.data.decode import read_clip, shown_frames
from mochi_lora.data.geometry import shown_size
from mochi_lora.data.probe import ClipInfo, probe, read_image
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.files import digest_of, out_of_space_named, write_atomic

_CLOCK = Fraction(1, 360_000)  # of 24000, 30000, 60000, 90000 and 1000 ticks a second
_SAME_TIME = 1e-6  # seconds
# Without B-frames no edit list is needed. Without scene cuts no key frame follows on another: from x264's key frames that
# are not IDR pictures decord 2 (3.4.0) returns other frames than asked for, without an error.
_LOSSLESS = {"qp": "0", "preset": "veryfast", "bf": "0", "sc_threshold": "0"}
_KEY_DIGITS = 12
_STEM_LENGTH = 60


@dataclass(frozen=True)
class Exported:
    """A clip in its own file."""

    path: Path
    start: float | None  # seconds: the file begins at the frame before, where `start` lies between two


def export_clip(source: ClipSource, info: ClipInfo, sha256: str, shapes: Shapes, folder: Path) -> Exported:
    """Write the clip into `folder`, under a name that its content decides; a file of that name is kept as it is.

    Raises ClipError where the clip fits no bucket of `shapes`, cannot be decoded, or does not read back bit for bit.
    """
    plan = plan_clip(source, info, shapes)
    path = folder / _name(source, info, sha256)
    wanted, start = _frames(source, info)
    found = Exported(path, start)
    if path.exists():
        return found
    if source.crop is None and source.end is None and not source.start:
        write_atomic(path, lambda temporary: _copy(source.path, temporary))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.stem}.tmp-{os.getpid()}-{get_ident()}{path.suffix}")  # images are known by their suffix
    try:
        with out_of_space_named(path):
            _write(draft, source, info, wanted)
        alone = replace(source, path=draft, start=start or 0.0, end=None, crop=None)
        _require_same(source, info, plan, alone, shapes)
        write_atomic(path, lambda temporary: _move(draft, temporary))
    finally:
        draft.unlink(missing_ok=True)
    return found


def _name(source: ClipSource, info: ClipInfo, sha256: str) -> str:
    key = digest_of([sha256, source.start, source.end, source.crop])[:_KEY_DIGITS]
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in source.path.stem)[:_STEM_LENGTH]
    whole = source.crop is None and source.end is None and not source.start
    suffix = source.path.suffix.lower() if whole else ".png" if info.is_image else ".mp4"
    return f"{stem}_{key}{suffix}"


def _frames(source: ClipSource, info: ClipInfo) -> tuple[list[int], float | None]:
    """Indices of the frames in the clip's range, and its start in the new file, whose first frame may lie before it.

    Instants are counted from `start`, not from a frame: without that frame they would all move.
    """
    stop = len(info.times) if source.end is None else bisect_left(info.times, source.end - _SAME_TIME)
    before = bisect_right(info.times, source.start + _SAME_TIME) - 1
    offset = source.start - info.times[before]
    return list(range(before, stop)), offset if offset > _SAME_TIME else None


def _cropped(source: ClipSource, picture: np.ndarray) -> np.ndarray:
    left, top, right, bottom = source.crop or (0, 0, picture.shape[1], picture.shape[0])
    return np.ascontiguousarray(picture[top:bottom, left:right])


def _copy(path: Path, target: Path) -> None:
    shutil.copyfile(path, target)


def _move(path: Path, target: Path) -> None:
    path.replace(target)


def _write(path: Path, source: ClipSource, info: ClipInfo, wanted: Sequence[int]) -> None:
    if info.is_image:
        Image.fromarray(_cropped(source, read_image(info.path))).save(path, format="PNG")
        return
    rate = Fraction(1 / info.frame_seconds).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options=_LOSSLESS)
        stream.codec_context.time_base = stream.time_base = _CLOCK
        stream.pix_fmt = "rgb24"
        stream.width, stream.height = shown_size(info, source)
        for index, picture in zip(wanted, shown_frames(info, wanted), strict=True):
            frame = VideoFrame.from_ndarray(_cropped(source, picture), format="rgb24")
            frame.pts, frame.time_base = round((info.times[index] - info.times[wanted[0]]) / _CLOCK), _CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _require_same(source: ClipSource, info: ClipInfo, plan: ClipPlan, alone: ClipSource, shapes: Shapes) -> None:
    """Read the new file as `encode` would and compare."""
    alone_info = probe(alone.path)
    again = plan_clip(alone, alone_info, shapes)
    if again.bucket != plan.bucket:
        message = f"{source.name}: in a file of its own it would be {again.bucket}, not {plan.bucket}; move its start or end"
        raise ClipError(message)
    if not torch.equal(read_clip(alone, alone_info, again.bucket), read_clip(source, info, plan.bucket)):
        raise ClipError(f"{source.name}: in a file of its own other frames would be chosen; move its start or end")
    if not info.is_image and not _decord_agrees(alone_info):
        raise ClipError(
            f"{source.name}: decord reads other frames from a file of its own; move its start or end, or leave it out"
        )


def _decord_agrees(info: ClipInfo) -> bool:
    """Whether decord finds the same frames, one after the other and by jumps to key frames."""
    import decord  # noqa: PLC0415 - loads a second FFmpeg

    decord.logging.set_level(decord.logging.QUIET)
    limit_reached = decord._ffi.base.DECORDLimitReachedError  # not exported
    try:
        reader = decord.VideoReader(str(info.path))
        if len(reader) != len(info.times):
            return False
        in_order = enumerate(shown_frames(info, range(len(info.times))))
        if not all(np.array_equal(reader[index].asnumpy(), ours) for index, ours in in_order):
            return False
        keys = sorted(reader.get_key_indices())
        jumped = reader.get_batch(keys[::-1]).asnumpy()[::-1]
    except (decord.DECORDError, limit_reached, RuntimeError, IndexError):
        return False
    return all(np.array_equal(theirs, ours) for theirs, ours in zip(jumped, shown_frames(info, keys), strict=True))
