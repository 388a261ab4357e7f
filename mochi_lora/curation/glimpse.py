"""A few key frames spread over a source, looked at before it is measured: which bars it seems to have throughout."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import cv2
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from mochi_lora.curation.bars import Crop, find_bars, lit_lines
from mochi_lora.data.probe import ClipInfo, open_video, unreadable_named
from mochi_lora.data.shown import as_shown
from mochi_lora.errors import ClipError

_MOST = 12
_SECONDS = 10  # of film for each, which then takes 1 or 2 % of the whole
_PACKETS = 600  # among which a key frame is looked for; some streams have none after their first


def glimpsed_bars(info: ClipInfo, size: tuple[int, int]) -> Crop | None:
    """Bars that all key frames looked at have, at `size` (width, height); None where there are none, or nothing can be read.

    A guess. What is wrong with a file is told by whoever reads all of it.
    """
    convert = VideoReformatter()
    looks: list[tuple[np.ndarray, np.ndarray]] = []
    with suppress(ClipError), unreadable_named(info.path), open_video(info.path) as (container, stream):
        for frame in _key_frames(info, container, stream):
            grey = cv2.cvtColor(as_shown(info, frame, convert, size=size), cv2.COLOR_RGB2GRAY)
            looks.append(lit_lines(grey))
    if not looks:
        return None
    rows, columns = (np.stack(lines) for lines in zip(*looks, strict=True))
    return find_bars(rows, columns, info.width, info.height, inwards=0)


def _key_frames(info: ClipInfo, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The key frame before each of some moments, once."""
    seen: set[int | None] = set()
    tick = float(stream.time_base or 0)
    for moment in _moments(info) if tick else (0.0,):
        if moment:
            container.seek(int((info.origin + moment) / tick), stream=stream)
        key = next((packet for packet in islice(container.demux(stream), _PACKETS) if packet.is_keyframe and packet.size), None)
        if key is None or key.pts in seen:
            continue
        seen.add(key.pts)
        # The decoder holds a frame back until later ones come, unless it is told that none will.
        frames = [*stream.codec_context.decode(key), *stream.codec_context.decode(None)]
        yield from (frame for frame in frames if not frame.is_corrupt)


def _moments(info: ClipInfo) -> tuple[float, ...]:
    """Seconds from the first frame, spread evenly."""
    if not info.seekable:
        return (0.0,)
    count = min(_MOST, 1 + int(info.duration / _SECONDS))
    return tuple(info.duration * (place + 0.5) / count for place in range(count))
