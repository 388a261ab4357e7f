"""A decoded frame as a person would see it: whole lines, square pixels, upright, SDR. The one definition for every reader.

Frames that need none of this come out exactly as PyAV converts them, which is bit for bit what decord gives.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction

import numpy as np
from av.error import BlockingIOError as NotYetError
from av.error import EOFError as NoMoreError
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from mochi_lora.data.probe import ClipInfo
from mochi_lora.data.tone_map import tone_map
from mochi_lora.errors import ClipError

# swscale's short cuts cost up to one 8-bit step in every channel: too much in PQ, where a step is 2 % of the light.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


def progressive(info: ClipInfo, stream: VideoStream, frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """The frames with every line of one instant: that of the field shown first. As many as before, at the same times.

    FFmpeg's bwdif ("Bob Weaver": w3fdif's filters where a pixel moves, the other field where it does not), in the field
    order that each frame states; frames marked progressive pass untouched. One frame out for one in, though fields at twice
    the rate could be had: an index or a time then means the same with and without it.
    """
    if not info.interlaced:
        yield from frames
        return
    graph = Graph()
    ends = graph.add_buffer(template=stream), graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    graph.link_nodes(*ends).configure()
    for frame in frames:
        _refuse_other_size(info, frame)
        graph.vpush(frame)
        yield from _ready(graph, stream.time_base)
    graph.vpush(None)
    yield from _ready(graph, stream.time_base)


def _ready(graph: Graph, tick: Fraction | None) -> Iterator[VideoFrame]:
    """What the filter has finished; it counts in half ticks, we in the stream's."""
    while True:
        try:
            frame = graph.vpull()
        except (NotYetError, NoMoreError):
            return
        if tick and frame.time_base and frame.pts is not None:
            frame.pts, frame.time_base = round(frame.pts * frame.time_base / tick), tick
        yield frame


def as_shown(
    info: ClipInfo, frame: VideoFrame, convert: VideoReformatter, *, size: tuple[int, int] | None = None
) -> np.ndarray:
    """uint8 RGB [info.height, info.width, 3] of a frame of `info`'s file. Raises ClipError if its size is another.

    With `size` (width, height) a thumbnail of that size instead, averaged over areas before anything else: far cheaper.
    One `convert` for all frames of a file: setting it up takes ten times as long as converting a small frame.
    """
    _refuse_other_size(info, frame)
    shown = size or (info.width, info.height)
    width, height = shown[::-1] if info.rotation in (90, 270) else shown
    plain = not (info.light or info.stored or size)
    method = None if plain else Interpolation.AREA if size else _EXACT
    pixels = "rgb48le" if info.light else "rgb24"
    picture = convert.reformat(frame, width, height, pixels, interpolation=method).to_ndarray()
    if info.light:
        picture = tone_map(picture, info.light)
    return np.ascontiguousarray(np.rot90(picture, info.rotation // 90))


def _refuse_other_size(info: ClipInfo, frame: VideoFrame) -> None:
    sideways = info.rotation in (90, 270)
    expected = info.stored or ((info.height, info.width) if sideways else (info.width, info.height))
    if (frame.width, frame.height) != expected:
        size = f"{frame.height}x{frame.width}" if sideways else f"{frame.width}x{frame.height}"
        raise ClipError(f"{info.path}: the picture size changes to {size}; cut it into clips of one size")
