"""Which source frames, which bucket, which crop. Pure functions of times and sizes; reads no file.

Frames are chosen by time stamp at Mochi's 30 per second, never by counting: sources have 24, 25, 29.97, 50, 60 frames per
second, or no constant rate at all.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mochi_lora.data.probe import ClipInfo
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import FRAMES_PER_SECOND, TIME_COMPRESSION, Bucket

_SAME_TIME = 1e-6  # seconds; far below every container's clock, far above the rounding of k / 30
# Sizes in steps of 16 cannot keep a ratio: 240x432 is the small 480x848, 1.9 % wider. Within this they are one shape.
_SAME_ASPECT = 0.03


class CropPlan(NamedTuple):
    """Scale to `scaled_width` x `scaled_height`, then cut the bucket's size out at (`left`, `top`). A list in JSON."""

    scaled_width: int
    scaled_height: int
    left: int
    top: int


def frame_times(frames: int) -> tuple[float, ...]:
    """Seconds of each output frame: k / 30."""
    return tuple(k / FRAMES_PER_SECOND for k in range(frames))


def nearest_frames(
    times: Sequence[float], frame_seconds: float, frames: int, start: float = 0.0, end: float | None = None
) -> list[int]:
    """Index into `times` (ascending seconds) for each of `frames` output frames from `start` on; never descending.

    Nearest in time, ties to the earlier; never a frame outside [start, end), which may belong to another shot.
    Raises ClipError where the clip is too short: the last instant may lie at most half a `frame_seconds` after the last
    source frame, so nothing is shown that the source does not reach.
    """
    first, stop = _range(times, start, end)
    fits = _frames_that_fit(times, frame_seconds, start, end)
    if fits < frames:
        raise ClipError(_too_short(times, frame_seconds, frames, fits, start, end))
    return [_nearest(times, start + offset, first, stop) for offset in frame_times(frames)]


def choose_bucket(info: ClipInfo, source: ClipSource, buckets: Sequence[Bucket], *, upscale: bool) -> Bucket:
    """The bucket of nearest aspect ratio (by its logarithm, 3 % apart count as equal), then most frames in time, then largest.

    Images take a one-frame bucket: of those configured, else one frame of the configured sizes. A clip smaller than every
    bucket left is a ClipError unless `upscale`; so is one too short for all buckets of its aspect ratio. What `source.crop`
    keeps counts as the whole picture.
    """
    if info.is_image:
        singles = [bucket for bucket in buckets if bucket.frames == 1]
        buckets = singles or [Bucket(1, bucket.height, bucket.width) for bucket in buckets]
    width, height = shown_size(info, source)
    aspect = math.log(width / height)
    distances = [abs(math.log(bucket.width / bucket.height) - aspect) for bucket in buckets]
    nearest = min(distances)
    group = [bucket for bucket, distance in zip(buckets, distances, strict=True) if distance - nearest < _SAME_ASPECT]
    fits = _frames_that_fit(info.times, info.frame_seconds, source.start, source.end)
    long_enough = [bucket for bucket in group if bucket.frames <= fits]
    if not long_enough:
        needed = min(bucket.frames for bucket in group)
        raise ClipError(f"{source.name}: {_too_short(info.times, info.frame_seconds, needed, fits, source.start, source.end)}")
    covered = [bucket for bucket in long_enough if upscale or (bucket.width <= width and bucket.height <= height)]
    if not covered:
        smallest = min(long_enough, key=lambda bucket: bucket.height * bucket.width)
        raise ClipError(
            f"{source.name}: {width}x{height} pixels are fewer than the bucket's {smallest.width}x{smallest.height} "
            "(width x height); set data.upscale: true, or configure a smaller bucket"
        )
    return max(covered, key=lambda bucket: (bucket.frames, bucket.height * bucket.width, bucket))


def shown_size(info: ClipInfo, source: ClipSource) -> tuple[int, int]:
    """Width and height of what becomes the clip: the picture as shown, or the part of it that `source.crop` keeps.

    Raises ClipError where the crop is empty or reaches out of the picture.
    """
    if source.crop is None:
        return info.width, info.height
    left, top, right, bottom = source.crop
    if not (0 <= left < right <= info.width and 0 <= top < bottom <= info.height):
        raise ClipError(
            f"{source.name}: crop {list(source.crop)} does not lie inside the picture of {info.width}x{info.height} pixels "
            "as shown; it is [left, top, right, bottom], the last two exclusive; mend or clear it in the table"
        )
    return right - left, bottom - top


def crop_plan(width: int, height: int, bucket: Bucket) -> CropPlan:
    """How a `width` x `height` picture becomes the bucket's: scaled just large enough to cover it, cropped at the centre."""
    return _plan(width, height, bucket.width, bucket.height)


def resize_and_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> float32 [3, T, height, width] in [-1, 1]; antialiased bicubic, aspect ratio kept.

    Frame by frame, so that only one is ever held in float32 at source size. Not rounded back to uint8: the VAE's Fourier
    features see the last bits (genmoai/mochi @0c86aeb `vae/models.py`, FourierFeatures). u / 127.5 - 1 is Genmo's range.
    """
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[3] == 3, (frames.dtype, frames.shape)  # noqa: PT018
    plan = _plan(frames.shape[2], frames.shape[1], width, height)
    out = torch.empty(3, frames.shape[0], height, width, dtype=torch.float32)
    for index, frame in enumerate(frames):
        picture = frame.permute(2, 0, 1).unsqueeze(0).float()
        if picture.shape[2:] != (plan.scaled_height, plan.scaled_width):
            size = (plan.scaled_height, plan.scaled_width)
            picture = torch.nn.functional.interpolate(picture, size, mode="bicubic", antialias=True, align_corners=False)
        cropped = picture[0, :, plan.top : plan.top + height, plan.left : plan.left + width]
        out[:, index] = (cropped / 127.5 - 1).clamp_(-1, 1)  # bicubic overshoots at edges
    return out


def _plan(width: int, height: int, to_width: int, to_height: int) -> CropPlan:
    scale = max(to_width / width, to_height / height)
    scaled_width, scaled_height = max(to_width, round(width * scale)), max(to_height, round(height * scale))
    return CropPlan(scaled_width, scaled_height, (scaled_width - to_width) // 2, (scaled_height - to_height) // 2)


def _range(times: Sequence[float], start: float, end: float | None) -> tuple[int, int]:
    """First index and stop index of the frames in [start, end)."""
    first = bisect_left(times, start - _SAME_TIME)
    stop = len(times) if end is None else bisect_left(times, end - _SAME_TIME)
    return first, max(first, stop)


def _frames_that_fit(times: Sequence[float], frame_seconds: float, start: float, end: float | None) -> int:
    """Output frames there is footage for, from `start` on; 0 when no source frame lies in the range."""
    first, stop = _range(times, start, end)
    if first == stop:
        return 0
    covered = times[stop - 1] + frame_seconds / 2 - start
    return max(0, math.floor((covered + _SAME_TIME) * FRAMES_PER_SECOND) + 1)


def _nearest(times: Sequence[float], instant: float, first: int, stop: int) -> int:
    later = min(max(bisect_left(times, instant, first, stop), first), stop - 1)
    if later == first:
        return later
    earlier = later - 1
    return later if abs(times[later] - instant) < abs(times[earlier] - instant) - _SAME_TIME else earlier


def _too_short(times: Sequence[float], frame_seconds: float, frames: int, fits: int, start: float, end: float | None) -> str:
    first, stop = _range(times, start, end)
    has = times[stop - 1] + frame_seconds - start if stop > first else 0.0
    needs = (frames - 1) / FRAMES_PER_SECOND + frame_seconds / 2
    legal = list(range(1, fits + 1, TIME_COMPRESSION))[::-1]
    shorter = ", ".join(str(count) for count in legal) or "none"
    return (
        f"clip too short: has {has:.3f} s, {frames} frames at {FRAMES_PER_SECOND} fps need {needs:.3f} s; "
        f"legal shorter counts: {shorter}"
    )
