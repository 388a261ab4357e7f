"""A clip's pixels, exactly the frames that its time stamps ask for.

PyAV decodes, once, and finds frames by their time stamps, after a jump to the key frame before the first. Where a
container's stamps are not to be trusted after a jump (MPEG streams, AVI, Ogg) the jump goes well ahead, and each frame is
held against what the probe saw of it. Where a jump fails, decoding from the file's beginning decides. Frames come one after
the other and are resized at once: a long 4K clip never lies in memory whole.

decord does not read clips: it hands out other frames than asked for, without an error, from MPEG streams and from H.264 with
key frames that are no IDR pictures, and made-up pictures for damaged data (decord2 3.4.0), so each of its clips took a second
decoding to check; with that it was three times as slow (benchmarks/LOG.md). `data.export` reads back with it.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image

from mochi_lora.data.geometry import nearest_frames, resize_and_crop, shown_size
from mochi_lora.data.probe import ClipInfo, mark_of, open_video, read_image, unreadable_named
from mochi_lora.data.shown import as_shown, progressive
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import Bucket

_FROZEN = 8  # this many frames that are all bit-identical are no film
_SAME_TIME = 1e-4  # seconds
_LEAD = 2  # frames before the first wanted one that a jump lands at or before: the deinterlacer looks back
# Seconds that a jump goes ahead, one after the other until a whole frame comes early enough. Containers without an index land
# anywhere; key frames are half a second apart on discs and in broadcasts, ten seconds at most by x264's default.
_RUN_UPS, _BY_INDEX = (1.0, 4.0, 12.0), (0.0,)


class _NotFoundError(Exception):
    """Decoding did not give the frame wanted next, or not undamaged."""

    def __init__(self, landed: float = 0.0) -> None:
        super().__init__()
        self.landed = landed  # seconds, of the first frame that came after a jump


class _InterlacedError(Exception):
    """The frame wanted next is interlaced, which the probe did not meet."""


def read_clip(source: ClipSource, info: ClipInfo, bucket: Bucket) -> torch.Tensor:
    """float32 [3, frames, height, width] in [-1, 1] of the bucket's shape.

    Raises ClipError where the clip is too short, damaged, one picture throughout, or `source.crop` does not lie inside it.
    A run of identical frames at its end is no sign of damage: drawn footage holds, and x264 keeps a hold bit for bit. PyAV
    gives none for an ending that is lost: it names the damage, or the frames do not come (unlike decord, which repeats).
    """
    shown_size(info, source)  # a wrong crop is told before anything is decoded
    if info.is_image:
        return _resized(source, read_image(info.path), bucket)
    chosen = nearest_frames(info.times, info.frame_seconds, bucket.frames, source.start, source.end)
    return _assemble(source, bucket, chosen, shown_frames(info, sorted(set(chosen))))


def read_stills(source: ClipSource, info: ClipInfo, wanted: Sequence[int], longest_side: int) -> list[np.ndarray]:
    """uint8 [height, width, 3] of the source frames `wanted` (ascending indices into `info.times`), cropped as the clip is.

    Shrunk at once to `longest_side` pixels, never enlarged. Raises ClipError as `read_clip` does.
    """
    shown_size(info, source)
    if info.is_image:
        return [_still(source, read_image(info.path), longest_side)]
    return [_still(source, frame, longest_side) for frame in shown_frames(info, wanted)]


def _still(source: ClipSource, frame: np.ndarray, longest_side: int) -> np.ndarray:
    picture = Image.fromarray(frame).crop(source.crop or (0, 0, frame.shape[1], frame.shape[0]))
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _resized(source: ClipSource, picture: np.ndarray, bucket: Bucket) -> torch.Tensor:
    """float32 [3, 1, height, width] of what the source's crop keeps."""
    left, top, right, bottom = source.crop or (0, 0, picture.shape[1], picture.shape[0])
    kept = np.ascontiguousarray(picture[top:bottom, left:right])
    return resize_and_crop(torch.from_numpy(kept).unsqueeze(0), bucket.height, bucket.width)


def _assemble(source: ClipSource, bucket: Bucket, chosen: Sequence[int], frames: Iterable[np.ndarray]) -> torch.Tensor:
    """Distinct source frames, in order, each into all the places that show it."""
    clip = torch.empty(3, bucket.frames, bucket.height, bucket.width, dtype=torch.float32)
    shown = Counter(chosen)  # in ascending order of frames, as `chosen` is
    at, moves, first = 0, False, None
    for times_shown, frame in zip(shown.values(), frames, strict=True):
        first = frame if first is None else first
        moves = moves or not np.array_equal(frame, first)
        clip[:, at : at + times_shown] = _resized(source, frame, bucket)
        at += times_shown
    if not moves and len(shown) >= _FROZEN:
        raise ClipError(
            f"{source.name}: all {len(shown)} frames of it are identical: nothing to learn about how things move, often a "
            "recording that froze; leave it out, or save one frame as an image"
        )
    return clip


def shown_frames(info: ClipInfo, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3] each: the source frames of these ascending indices, as shown, uncropped.

    Raises ClipError where one is damaged or does not come, or where one is damaged that those wanted may be made from.
    """
    run_ups: list[float | None] = [*_jumps(info, wanted[0]), None]
    given = 0
    sound_from = 0.0  # seconds; damage before the key frame that a jump found harms nothing that follows it
    while True:
        try:
            for picture in _found(info, wanted[given:], run_ups[0], sound_from):
                yield picture
                given += 1
        except _InterlacedError:  # progressive frames pass the deinterlacer untouched: those given are right
            info = replace(info, interlaced=True)
        except _NotFoundError as error:
            if run_ups.pop(0) is None:
                raise _missing(info, wanted[given]) from error
            sound_from = max(sound_from, error.landed)
        else:
            return


def _jumps(info: ClipInfo, first: int) -> tuple[float, ...]:
    """Seconds to go ahead of the frame of index `first`; each is worth a try before the file is decoded from its beginning."""
    if not info.seekable or first <= _LEAD:
        return ()
    return tuple(run_up for run_up in (_RUN_UPS if info.marks else _BY_INDEX) if info.times[first - _LEAD] > run_up)


def _missing(info: ClipInfo, index: int) -> ClipError:
    return ClipError(
        f"{info.path}: frame {index} at {info.times[index]:.3f} s cannot be decoded: the file is damaged or truncated; "
        "copy it again or cut it before"
    )


def _found(info: ClipInfo, wanted: Sequence[int], run_up: float | None, sound_from: float) -> Iterator[np.ndarray]:
    """One pass over the file, after a jump `run_up` seconds ahead of the first frame wanted, or (None) from the beginning.

    Raises _NotFoundError and _InterlacedError at the first frame that fails.
    """
    expected = iter(wanted)
    index = next(expected)
    convert = VideoReformatter()
    with unreadable_named(info.path), open_video(info.path) as (container, stream):
        tick = float(stream.time_base or 0)
        if run_up is None:
            sound = _undamaged(info, container.decode(stream), tick, sound_from, info.times[wanted[-1]])
        else:
            needed = info.times[index - _LEAD]
            container.seek(int((info.origin + needed - run_up) / tick), stream=stream)
            sound = _after_jump(info, container.decode(stream), tick, needed, info.times[wanted[-1]])
        for frame in progressive(info, stream, sound):
            time = _time(info, frame, tick)
            if time < info.times[index] - _SAME_TIME:
                continue
            if time > info.times[index] + _SAME_TIME:
                break
            if frame.interlaced_frame and not info.interlaced:
                raise _InterlacedError
            yield as_shown(info, frame, convert)
            following = next(expected, None)
            if following is None:
                return
            index = following
    raise _NotFoundError


def _time(info: ClipInfo, frame: VideoFrame, tick: float) -> float:
    """Seconds from the first frame shown; before it where the frame has no stamp."""
    return -1.0 if frame.pts is None else frame.pts * tick - info.origin


def _undamaged(
    info: ClipInfo, frames: Iterable[VideoFrame], tick: float, sound_from: float, last: float
) -> Iterator[VideoFrame]:
    """The frames as they come. Raises ClipError where one between the two instants is damaged.

    Decoders hand out pictures that they made up for damaged data as if nothing was; only the frame's flag tells.
    """
    for frame in frames:
        time = _time(info, frame, tick)
        if frame.is_corrupt and sound_from - _SAME_TIME <= time <= last + _SAME_TIME:
            raise ClipError(f"{info.path}: damaged at {time:.3f} s; copy it again or choose a range without it")
        yield frame


def _after_jump(info: ClipInfo, frames: Iterable[VideoFrame], tick: float, needed: float, last: float) -> Iterator[VideoFrame]:
    """The frames from the first whole one on. Raises _NotFoundError if that comes after `needed`, or a later one is not whole.

    Not whole is also a picture that refers to what lies before the jump: streams without true key frames have such.
    """
    landed: float | None = None
    begun = not info.marks
    for frame in frames:
        time = _time(info, frame, tick)
        landed = time if landed is None else landed
        whole = not frame.is_corrupt and (not info.marks or _is_the_one(info, time, frame))
        begun |= whole
        if not whole and time <= last + _SAME_TIME and (begun or time > needed - _SAME_TIME):
            raise _NotFoundError(max(0.0, landed))
        if begun:
            yield frame


def _is_the_one(info: ClipInfo, time: float, frame: VideoFrame) -> bool:
    """Whether the probe saw this very picture at this time: stamps between two that the file states are guesses."""
    index = bisect_left(info.times, time - _SAME_TIME)
    known = index < len(info.times) and abs(info.times[index] - time) <= _SAME_TIME
    return known and info.marks[index] == mark_of(frame)
