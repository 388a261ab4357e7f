"""A clip's pixels, exactly the frames that its time stamps ask for.

decord where `data.probe` says so, PyAV otherwise. decord is given up for a clip, and PyAV decodes it, when decord raises,
recovers a damaged frame, meets interlaced frames, or disagrees with the probe about the number, size or times of frames
(edit lists). The two give bit-identical pictures where both are right (at odd heights they smooth 4:2:0 colour differently,
by FFmpeg's choice), so the rule never shows in the result. PyAV finds
frames by their time stamps, after a jump to the key frame before the first where the container allows one, else from the
file's beginning. Frames come one after the other and are resized at once: a long 4K clip never lies in memory whole.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image

from mochi_lora.data.geometry import nearest_frames, resize_and_crop, shown_size
from mochi_lora.data.probe import ClipInfo, open_video, read_image, unreadable_named
from mochi_lora.data.shown import as_shown, progressive
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import Bucket

_CHUNK = 8  # frames asked of decord at once
_FROZEN_TAIL = 8  # this many bit-identical frames at the end are no film: even a still scene has coding noise
_SAME_TIME = 1e-4  # seconds
_LEAD = 2  # frames before the first wanted one that a jump lands at or before: the deinterlacer looks back
_NO_RECOVERED_FRAMES = 1e-9  # decord's fault_tol as a share of frames; its default -1 hands out repeats silently


class _DecordError(Exception):
    """decord cannot be trusted with this clip."""


class _NotFoundError(Exception):
    """Decoding did not give the frame wanted next, or not undamaged."""


def read_clip(source: ClipSource, info: ClipInfo, bucket: Bucket) -> torch.Tensor:
    """float32 [3, frames, height, width] in [-1, 1] of the bucket's shape.

    Raises ClipError where the clip is too short, damaged, ends in a run of identical frames (what decoders make of a file
    whose ending is lost), or `source.crop` does not lie inside the picture.
    """
    shown_size(info, source)  # a wrong crop is told before anything is decoded
    if info.is_image:
        return _resized(source, read_image(info.path), bucket)
    chosen = nearest_frames(info.times, info.frame_seconds, bucket.frames, source.start, source.end)
    wanted = sorted(set(chosen))
    if info.backend == "decord":
        if _interlaced_or_refused(info, info.times[wanted[0]], info.times[wanted[-1]]):
            return read_clip(source, replace(info, backend="pyav", interlaced=True), bucket)
        try:
            return _assemble(source, bucket, chosen, _decord_frames(info, wanted))
        except _DecordError:
            pass
    return _assemble(source, bucket, chosen, _pyav_frames(info, wanted))


def read_stills(source: ClipSource, info: ClipInfo, wanted: Sequence[int], longest_side: int) -> list[np.ndarray]:
    """uint8 [height, width, 3] of the source frames `wanted` (ascending indices into `info.times`), cropped as the clip is.

    Shrunk at once to `longest_side` pixels, never enlarged. Raises ClipError as `read_clip` does.
    """
    shown_size(info, source)
    if info.is_image:
        return [_still(source, read_image(info.path), longest_side)]
    if info.backend == "decord":
        if _interlaced_or_refused(info, info.times[wanted[0]], info.times[wanted[-1]]):
            return read_stills(source, replace(info, backend="pyav", interlaced=True), wanted, longest_side)
        try:
            return [_still(source, frame, longest_side) for frame in _decord_frames(info, wanted)]
        except _DecordError:
            pass
    return [_still(source, frame, longest_side) for frame in _pyav_frames(info, wanted)]


def _still(source: ClipSource, frame: np.ndarray, longest_side: int) -> np.ndarray:
    picture = Image.fromarray(frame).crop(source.crop or (0, 0, frame.shape[1], frame.shape[0]))
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def shown_frames(info: ClipInfo, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3] each: the frames of these ascending indices as `read_clip` sees them, uncropped.

    Raises ClipError where one is damaged or does not come.
    """
    if info.backend == "decord" and _interlaced_or_refused(info, info.times[wanted[0]], info.times[wanted[-1]]):
        info = replace(info, backend="pyav", interlaced=True)
    yield from _pyav_frames(info, wanted)


def _resized(source: ClipSource, picture: np.ndarray, bucket: Bucket) -> torch.Tensor:
    """float32 [3, 1, height, width] of what the source's crop keeps."""
    left, top, right, bottom = source.crop or (0, 0, picture.shape[1], picture.shape[0])
    kept = np.ascontiguousarray(picture[top:bottom, left:right])
    return resize_and_crop(torch.from_numpy(kept).unsqueeze(0), bucket.height, bucket.width)


def _assemble(source: ClipSource, bucket: Bucket, chosen: Sequence[int], frames: Iterable[np.ndarray]) -> torch.Tensor:
    """Distinct source frames, in order, each into all the places that show it."""
    clip = torch.empty(3, bucket.frames, bucket.height, bucket.width, dtype=torch.float32)
    shown = Counter(chosen)  # in ascending order of frames, as `chosen` is
    at, frozen, previous = 0, 0, None
    for times_shown, frame in zip(shown.values(), frames, strict=True):
        frozen = frozen + 1 if previous is not None and np.array_equal(frame, previous) else 1
        previous = frame
        clip[:, at : at + times_shown] = _resized(source, frame, bucket)
        at += times_shown
    if frozen >= _FROZEN_TAIL:
        raise ClipError(f"{source.name}: the last {frozen} frames are identical: a damaged or frozen ending; trim it")
    return clip


def _interlaced_or_refused(info: ClipInfo, first: float, last: float) -> bool:
    """Look with PyAV at what decord is to give: is any frame interlaced? Raises ClipError where any is damaged.

    decord hands out pictures that FFmpeg made up for damaged data; only the frame's flag, which PyAV shows, tells.
    Decodes once more, from the key frame before `first`. Frames after a jump may be flagged only because what they refer
    to lies before it (streams refreshed without key frames), so a finding counts if decoding from the beginning has it too.
    """
    with unreadable_named(info.path):
        damaged, interlaced = _looked_at(info, first, last)
        if damaged:
            damaged &= _looked_at(info, 0.0, last)[0]
    if damaged:
        raise ClipError(f"{info.path}: damaged at {min(damaged):.3f} s; copy it again or choose a range without it")
    return interlaced


def _looked_at(info: ClipInfo, first: float, last: float) -> tuple[set[float], bool]:
    """Times of damaged frames from the key frame before `first` on, and whether any frame is interlaced."""
    with open_video(info.path) as (container, stream):
        tick = float(stream.time_base or 0)
        if first:
            container.seek(int((info.origin + first) / tick), stream=stream)
        damaged, interlaced = set(), False
        for frame in container.decode(stream):
            time = last if frame.pts is None else frame.pts * tick - info.origin
            if time > last + _SAME_TIME:
                break
            interlaced |= frame.interlaced_frame
            if frame.is_corrupt:
                damaged.add(time)
        return damaged, interlaced


@contextmanager
def _decord_failures(decord: ModuleType) -> Iterator[None]:
    limit_reached = decord._ffi.base.DECORDLimitReachedError  # not exported
    try:
        yield
    # AssertionError: decord asserts its frame count; ValueError covers UnicodeDecodeError.
    except (decord.DECORDError, limit_reached, RuntimeError, IndexError, ValueError, OSError, AssertionError) as error:
        raise _DecordError(str(error)) from error


def _decord_frames(info: ClipInfo, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3] each, upright: decord turns frames itself."""
    import decord  # noqa: PLC0415 - loads a second FFmpeg; many a data set never needs it

    decord.logging.set_level(decord.logging.QUIET)
    with _decord_failures(decord):
        reader = decord.VideoReader(str(info.path), fault_tol=_NO_RECOVERED_FRAMES)
        stamps = reader.get_frame_timestamp([0, *wanted])[:, 0].astype(float)
        count = len(reader)
    expected = np.array([info.times[index] for index in wanted])
    # decord keeps seconds in float32, so a quarter of a frame, not less, is what can be asked of it.
    if count != len(info.times) or not np.all(np.abs(stamps[1:] - stamps[0] - expected) < info.frame_seconds / 4):
        raise _DecordError("frame count or time stamps differ from the probe's")
    for at in range(0, len(wanted), _CHUNK):
        asked = list(wanted[at : at + _CHUNK])
        with _decord_failures(decord):
            chunk = reader.get_batch(asked).asnumpy()
        if chunk.shape != (len(asked), info.height, info.width, 3):
            raise _DecordError(f"{chunk.shape} is not what was asked for")
        yield from chunk


def _pyav_frames(info: ClipInfo, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3] each, as shown; found by time stamp."""
    given = 0
    if info.seekable and wanted[0] > _LEAD:
        try:
            for picture in _found(info, wanted, jump=True):
                yield picture
                given += 1
        except _NotFoundError:
            _interlaced_or_refused(info, info.times[wanted[0]], info.times[wanted[-1]])
        else:
            return
    try:
        yield from _found(info, wanted[given:], jump=False)
    except _NotFoundError as error:
        index = int(str(error))
        raise ClipError(
            f"{info.path}: frame {index} at {info.times[index]:.3f} s cannot be decoded: the file is damaged or truncated; "
            "copy it again or cut it before"
        ) from None


def _found(info: ClipInfo, wanted: Sequence[int], *, jump: bool) -> Iterator[np.ndarray]:
    """The frames of these indices. Raises _NotFoundError with the index of the first that does not come."""
    expected = iter(wanted)
    index = next(expected)
    convert = VideoReformatter()
    with unreadable_named(info.path), open_video(info.path) as (container, stream):
        tick = float(stream.time_base or 0)
        if jump:
            container.seek(int((info.origin + info.times[index - _LEAD]) / tick), stream=stream)
        for frame in progressive(info, stream, container.decode(stream)):
            time = -1.0 if frame.pts is None else frame.pts * tick - info.origin
            if jump and frame.is_corrupt:  # what it refers to may lie before the jump; the next frames may refer to it
                break
            if time < info.times[index] - _SAME_TIME:
                continue
            if time > info.times[index] + _SAME_TIME or frame.is_corrupt:
                break
            yield as_shown(info, frame, convert)
            following = next(expected, None)
            if following is None:
                return
            index = following
    raise _NotFoundError(index)
