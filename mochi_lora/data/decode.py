"""A clip's pixels, exactly the frames that its time stamps ask for.

decord where `data.probe` says so, PyAV otherwise. decord is given up for a clip, and PyAV decodes it forward, when decord
raises, recovers a damaged frame, or disagrees with the probe about the number, size or times of frames (edit lists). The
two give bit-identical pictures where both are right, so the rule never shows in the result. Frames come one after the other
and are resized at once: a long 4K clip never lies in memory whole.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch

from mochi_lora.data.geometry import nearest_frames, resize_and_crop
from mochi_lora.data.probe import ClipInfo, open_video, read_image, unreadable_named
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import Bucket

_CHUNK = 8  # frames asked of decord at once
_FROZEN_TAIL = 8  # this many bit-identical frames at the end are no film: even a still scene has coding noise
_SAME_TIME = 1e-4  # seconds
_NO_RECOVERED_FRAMES = 1e-9  # decord's fault_tol as a share of frames; its default -1 hands out repeats silently


class _DecordError(Exception):
    """decord cannot be trusted with this clip."""


def read_clip(source: ClipSource, info: ClipInfo, bucket: Bucket) -> torch.Tensor:
    """float32 [3, frames, height, width] in [-1, 1] of the bucket's shape.

    Raises ClipError where the clip is too short, damaged, or ends in a run of identical frames (what decoders make of a
    file whose ending is lost).
    """
    if info.is_image:
        return resize_and_crop(torch.from_numpy(read_image(info.path)).unsqueeze(0), bucket.height, bucket.width)
    chosen = nearest_frames(info.times, info.frame_seconds, bucket.frames, source.start, source.end)
    wanted = sorted(set(chosen))
    if info.backend == "decord":
        _refuse_concealed(info, info.times[wanted[0]], info.times[wanted[-1]])
        try:
            return _assemble(source, bucket, chosen, _decord_frames(info, wanted))
        except _DecordError:
            pass
    return _assemble(source, bucket, chosen, _pyav_frames(info, wanted))


def _assemble(source: ClipSource, bucket: Bucket, chosen: Sequence[int], frames: Iterable[np.ndarray]) -> torch.Tensor:
    """Distinct source frames, in order, each into all the places that show it."""
    clip = torch.empty(3, bucket.frames, bucket.height, bucket.width, dtype=torch.float32)
    shown = Counter(chosen)  # in ascending order of frames, as `chosen` is
    at, frozen, previous = 0, 0, None
    for times_shown, frame in zip(shown.values(), frames, strict=True):
        frozen = frozen + 1 if previous is not None and np.array_equal(frame, previous) else 1
        previous = frame
        clip[:, at : at + times_shown] = resize_and_crop(torch.from_numpy(frame).unsqueeze(0), bucket.height, bucket.width)
        at += times_shown
    if frozen >= _FROZEN_TAIL:
        raise ClipError(f"{source.name}: the last {frozen} frames are identical: a damaged or frozen ending; trim it")
    return clip


def _refuse_concealed(info: ClipInfo, first: float, last: float) -> None:
    """decord hands out pictures that FFmpeg made up for damaged data; only the frame's flag, which PyAV shows, tells.

    Decodes once more, from the key frame before `first`. Frames after a jump may be flagged only because what they refer
    to lies before it (streams refreshed without key frames), so a finding counts if decoding from the beginning has it too.
    """
    with unreadable_named(info.path):
        if damaged := _damaged_times(info, first, last):
            damaged &= _damaged_times(info, 0.0, last)
    if damaged:
        raise ClipError(f"{info.path}: damaged at {min(damaged):.3f} s; copy it again or choose a range without it")


def _damaged_times(info: ClipInfo, first: float, last: float) -> set[float]:
    with open_video(info.path) as (container, stream):
        tick = float(stream.time_base or 0)
        if first:
            container.seek(int((info.origin + first) / tick), stream=stream)
        damaged = set()
        for frame in container.decode(stream):
            time = last if frame.pts is None else frame.pts * tick - info.origin
            if time > last + _SAME_TIME:
                break
            if frame.is_corrupt:
                damaged.add(time)
        return damaged


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
    """uint8 [height, width, 3] each, turned upright; decoded from the beginning, found by time stamp."""
    expected = iter(wanted)
    index = next(expected)
    with unreadable_named(info.path), open_video(info.path) as (container, stream):
        for frame in container.decode(stream):
            time = -1.0 if frame.pts is None else float(frame.pts * (stream.time_base or 0)) - info.origin
            if time < info.times[index] - _SAME_TIME:
                continue
            if time > info.times[index] + _SAME_TIME or frame.is_corrupt:
                break
            yield _upright(info, frame.to_ndarray(format="rgb24"))
            following = next(expected, None)
            if following is None:
                return
            index = following
    raise ClipError(
        f"{info.path}: frame {index} at {info.times[index]:.3f} s cannot be decoded: the file is damaged or truncated; "
        "copy it again or cut it before"
    )


def _upright(info: ClipInfo, frame: np.ndarray) -> np.ndarray:
    turned = np.ascontiguousarray(np.rot90(frame, info.rotation // 90))
    if turned.shape[:2] != (info.height, info.width):
        size = f"{turned.shape[1]}x{turned.shape[0]}"
        raise ClipError(f"{info.path}: the picture size changes to {size}; cut it into clips of one size")
    return turned
