"""What a media file holds: size as shown, how it is to be shown, time stamp of every frame. Refuses what cannot be right.

Containers that state the time of every frame are not decoded for it. MPEG streams, AVI and Ogg do not: their frames are
decoded once, and what each looks like is kept beside its time, so that a jump into the file can be held against it.
"""

import statistics
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import ExifTags, Image

from mochi_lora.data.colour_tags import light_of
from mochi_lora.data.media import IMAGE_SUFFIXES
from mochi_lora.data.tone_map import Light
from mochi_lora.data.truncation import missing_bytes
from mochi_lora.errors import ClipError

# Demuxer names: a .mp4 that is an MPEG stream inside is found out.
# AVI has no presentation times, only the decoding order: what its packets claim is wrong for B-frames.
_TIMES_IN_PACKETS = ("mov,mp4", "matroska,webm", "gif")
_MOST_STRETCHED = 4  # no camera or disc goes beyond 2.2; beyond this a tag is damaged
_SQUARE_PIXEL_TOLERANCE = 0.01  # scalers tag 426x240 out of 1280x720 as 640:639; nobody sees that
_CODECS_THAT_FLAG = ("h264", "mpeg2video", "mpeg1video", "vc1")  # each picture says whether it is interlaced
_MARKED_LINES = 4  # of so many lines one: every block of every codec has some, at a twentieth of the time that decoding takes
_FRAMES_LOOKED_AT = 4  # a field-coded stream may begin with one progressive picture
# EXIF's numbers for how the stored picture comes upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDE_IMAGE_MODES = ("I", "F")  # 16-bit, 32-bit and float; Pillow clips them to white when it converts to RGB


@dataclass(frozen=True)
class ClipInfo:
    """One media file, as `data.geometry` and `data.decode` need to know it."""

    path: Path
    width: int  # as shown, after rotation
    height: int
    rotation: int  # degrees counter-clockwise that the coded picture is turned for showing: 0, 90, 180, 270
    times: tuple[float, ...]  # seconds, of every frame that can be decoded, ascending from 0.0
    frame_seconds: float  # typical interval between frames (median); 0.0 for images
    is_image: bool
    origin: float = 0.0  # the first frame's time stamp in the container, in seconds
    light: Light | None = None  # how code values are to be read where they are not plain SDR
    interlaced: bool = False
    stored: tuple[int, int] | None = None  # width and height as coded, before any rotation, if pixels are not square
    seekable: bool = False  # whether to jump to a time stamp
    marks: tuple[int, ...] = ()  # of every frame, where a jump cannot be trusted to land before it: `mark_of` its picture

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last one; 0 for images."""
        return self.times[-1] + self.frame_seconds


@contextmanager
def unreadable_named(path: Path) -> Iterator[None]:
    """Turn everything PyAV and Pillow raise on bad files into a `ClipError` that names `path`.

    Python's own MemoryError passes. PyAV's is one of FFmpeg's errors: a header that promises the absurd gives it as well.
    """
    try:
        yield
    except ClipError:
        raise
    # UnicodeDecodeError (a ValueError) and IndexError come from PyAV, SyntaxError from Pillow's PNG reader.
    except (av.FFmpegError, OSError, ValueError, IndexError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ClipError(f"{path}: cannot be read as video or image ({reason}); see if it plays, convert it again") from error


def probe(path: Path) -> ClipInfo:
    """Everything about the file but its pixels. Raises ClipError naming the file and what to do."""
    if not path.is_file():
        raise ClipError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ClipError(f"{path}: the file is empty; copy or download it again")
    if missing := missing_bytes(path):
        raise ClipError(f"{path}: the file is truncated ({missing} bytes or more are missing); copy or download it again")
    with unreadable_named(path):
        return _probe_image(path) if path.suffix.lower() in IMAGE_SUFFIXES else _probe_video(path)


def read_image(path: Path) -> np.ndarray:
    """The picture upright, uint8 [height, width, 3]; transparent parts over black. Raises ClipError."""
    with unreadable_named(path), Image.open(path) as opened:
        if opened.mode.startswith(_WIDE_IMAGE_MODES):
            raise ClipError(f"{path}: more than 8 bits per channel (mode {opened.mode}); save it with 8 bits per channel")
        upright = _upright(opened).convert("RGBA")
        black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
        return np.array(Image.alpha_composite(black, upright).convert("RGB"))


def _upright(opened: Image.Image) -> Image.Image:
    """As EXIF says, if it says so; where it cannot be read the picture is shown as stored, as viewers do.

    Pillow's `exif_transpose` writes all of EXIF anew and fails on fields, of no concern here, that are odd or damaged.
    """
    opened.load()  # Pillow finds some of PNG's and WebP's EXIF only behind the pixels
    try:
        method = _UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, struct.error, TypeError, ValueError):  # what Pillow's reader makes of a damaged header
        return opened
    return opened if method is None else opened.transpose(method)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and the stream players show. Raises ClipError where there is none (cover art of a sound file is none)."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            raise ClipError(f"{path}: holds no video, only {_other_streams(container)}; remove it from the clips")
        # Frame threads would set `is_corrupt` on a half picture in some runs and not in others.
        stream.thread_type = "SLICE"
        yield container, stream


def _other_streams(container: InputContainer) -> str:
    return " and ".join(sorted({stream.type for stream in container.streams})) or "an empty container"


def _probe_image(path: Path) -> ClipInfo:
    height, width, _ = read_image(path).shape  # whole, not only its header: a truncated image is found here
    return ClipInfo(path, width, height, 0, (0.0,), 0.0, is_image=True)


class _Timeline(NamedTuple):
    origin: float
    times: tuple[float, ...]
    interlaced: bool = False  # whether any frame looked at is
    marks: tuple[int, ...] = ()


def _probe_video(path: Path) -> ClipInfo:
    with open_video(path) as (container, stream):
        frames = list(islice(container.decode(stream), _FRAMES_LOOKED_AT))
        if not frames:
            raise ClipError(f"{path}: no frame of it can be decoded; convert it again")
        light = light_of(path, stream, frames[0])
        rotation = _rotation(path, frames[0])
        stored = frames[0].width, frames[0].height
        shown = _square(path, stream, *stored)
        interlaced = any(frame.interlaced_frame for frame in frames)
        if not interlaced and stream.codec_context.field_order > 1 and stream.codec_context.name not in _CODECS_THAT_FLAG:
            raise ClipError(
                f"{path}: its container says interlaced, its pictures do not say how; deinterlace it first "
                "(ffmpeg -vf setfield=tff,bwdif, or setfield=bff)"
            )
        container_format = container.format.name
        rate = stream.average_rate
    in_packets = container_format.startswith(_TIMES_IN_PACKETS)
    # The two fields of an interlaced frame may be two packets.
    timeline = _times_from_packets(path) if in_packets and not interlaced else _times_from_frames(path)
    interlaced |= timeline.interlaced
    intervals = [later - earlier for earlier, later in pairwise(timeline.times)]
    return ClipInfo(
        path=path,
        width=shown[1] if rotation in (90, 270) else shown[0],
        height=shown[0] if rotation in (90, 270) else shown[1],
        rotation=rotation,
        times=timeline.times,
        frame_seconds=statistics.median(intervals) if intervals else float(1 / (rate or 30)),
        is_image=False,
        origin=timeline.origin,
        light=light,
        interlaced=interlaced,
        stored=None if shown == stored else stored,
        seekable=in_packets or bool(timeline.marks),
        marks=() if in_packets else timeline.marks,
    )


def _square(path: Path, stream: VideoStream, width: int, height: int) -> tuple[int, int]:
    """Width and height in square pixels; the side that grows is scaled, as mpv does, so that nothing is lost."""
    aspect = float(stream.sample_aspect_ratio or 1)  # None or 0 when unset
    if abs(aspect - 1) <= _SQUARE_PIXEL_TOLERANCE:
        return width, height
    if not 1 / _MOST_STRETCHED <= aspect <= _MOST_STRETCHED:
        ratio = stream.sample_aspect_ratio
        raise ClipError(f"{path}: pixels of {ratio} width to height, a damaged tag; convert it again with the right setsar")
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _rotation(path: Path, frame: VideoFrame) -> int:
    rotation = frame.rotation % 360
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if isinstance(matrix, SideData):
        a, b, _, c, d = np.frombuffer(bytes(matrix), dtype="<i4")[:5].astype(float)
        if a * d - b * c < 0:  # PyAV reports a plain mirror as a turn by 180 degrees
            raise ClipError(f"{path}: tagged to be shown mirrored; convert it again so that the pixels are stored as shown")
    if rotation % 90:
        raise ClipError(f"{path}: tagged to be shown turned by {rotation} degrees; only multiples of 90 can be applied")
    return rotation


def _times_from_packets(path: Path) -> _Timeline:
    """Without decoding. Packets that an edit list hides are left out: no decoder of FFmpeg's shows them."""
    with open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if any(packet.is_corrupt for packet in packets):
            raise ClipError(f"{path}: holds damaged packets, often a truncated file; copy or download it again")
        stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
        if not stamps or len(stamps) != len(packets) or len(set(stamps)) != len(stamps):
            return _times_from_frames(path)
        return _relative(stamps, float(stream.time_base or 0))


def _times_from_frames(path: Path) -> _Timeline:
    """By decoding everything, forward: exact for MPEG streams, whose packets are not all stamped."""
    stamps: list[int] = []
    marks: list[int] = []
    interlaced = False
    with open_video(path) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt and not stamps:  # recordings begin between key frames
                continue
            if frame.is_corrupt:
                raise ClipError(f"{path}: frame {len(stamps)} is damaged, as in a truncated file; copy it again or trim it")
            if frame.pts is None or (stamps and frame.pts <= stamps[-1]):
                raise ClipError(f"{path}: its time stamps are missing or out of order; convert it (ffmpeg -i IN OUT.mp4)")
            stamps.append(frame.pts)
            marks.append(mark_of(frame))
            interlaced |= frame.interlaced_frame
        if not stamps:
            raise ClipError(f"{path}: no undamaged frame can be decoded; convert it again")
        return _relative(stamps, float(stream.time_base or 0))._replace(interlaced=interlaced, marks=tuple(marks))


def mark_of(frame: VideoFrame) -> int:
    """CRC-32 of every fourth line of the frame as decoded, of its first plane: luma, green or palette indices."""
    plane = frame.planes[0]
    used = plane.width * -(-frame.format.components[0].bits // 8)  # what pads a line in memory nobody has written
    lines = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[::_MARKED_LINES, :used]
    return zlib.crc32(lines.tobytes())


def _relative(stamps: list[int], tick: float) -> _Timeline:
    return _Timeline(stamps[0] * tick, tuple((stamp - stamps[0]) * tick for stamp in stamps))
