"""What one pass over a source finds out: a few numbers a frame, from which shots, clips and filters follow without decoding.

Measured on 2 cores, 720p H.264: decoding is most of the time, and FFmpeg's own area scaling comes almost free with it, so
every measure works on a thumbnail (128 pixels on the short side) or, four times a second, on 360 lines of luma.

Bars that stand throughout a source are no part of its picture: it would be darker, flicker less and change less at a cut
than without them, and no duplicate of its copy without. What is measured lies inside them.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.bars import Crop, alike, find_bars
from mochi_lora.curation.frame_measures import FrameMeasures
from mochi_lora.curation.glimpse import glimpsed_bars
from mochi_lora.data.probe import ClipInfo, open_video, unreadable_named
from mochi_lora.data.shown import as_shown
from mochi_lora.errors import ClipError
from mochi_lora.files import digest_of, write_atomic

SCHEMA = 2  # counts changes to what is measured, and how
THUMB, LINES = 128, 360  # short side of the thumbnail and of the luma looked at for sharpness and bars, in pixels
_LONGEST = 4  # times the short side; beyond, a panorama's thumbnail would be as large as its picture
_NARROWEST = 16  # pixels of the thumbnail; OpenCV's DIS flow reads beyond its memory where a side is smaller
_SAME_TIME = 1e-4  # seconds
_REPORT_EVERY = 64  # frames
_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Survey:
    """One source, frame by frame. N frames, K looks (four a second), all arrays in the order of time."""

    width: int  # pixels as shown
    height: int
    frame_seconds: float
    duration: float
    times: np.ndarray  # float64 [N], seconds from the first frame
    luma: np.ndarray  # float32 [N], mean, 0 to 255
    contrast: np.ndarray  # float32 [N], standard deviation of the luma
    change: np.ndarray  # float32 [N], mean absolute difference of the luma to the frame before
    swing: np.ndarray  # float32 [N], change of brightness to and fro that all of the picture shares (see `frame_measures`)
    spread: np.ndarray  # float32 [N], mean difference between the frames a quarter of a second before and after
    bend: np.ndarray  # float32 [N], how far this frame is from the mean of those two, as a share of `spread`
    hashes: np.ndarray  # uint64 [N], DCT hash of the picture
    cuts: np.ndarray  # int64 [C], indices of frames that begin a shot after a hard cut
    looks: np.ndarray  # int64 [K], indices of the frames looked at more closely
    motion: np.ndarray  # float32 [K], fastest 5 % of the flow, percent of the short side per 1/8 s
    sharpness: np.ndarray  # float32 [K], variance of the Laplacian at 360 lines
    lit_rows: np.ndarray  # uint8 [K, rows], share of each row's pixels that are not black, 255 is all
    lit_columns: np.ndarray  # uint8 [K, columns]

    @property
    def around(self) -> int:
        """Frames in the quarter of a second that `spread` and `bend` look to each side."""
        return frames_around(self.frame_seconds)

    def bars(self, first: int, stop: int) -> Crop | None:
        """What the frames [first, stop) show inside the bars that all of them have (see `find_bars`); of the whole picture."""
        looks = (self.looks >= first) & (self.looks < stop)
        return find_bars(self.lit_rows[looks], self.lit_columns[looks], self.width, self.height)


_ARRAYS = tuple(name for name, kind in Survey.__annotations__.items() if kind is np.ndarray)
_NUMBERS = tuple(name for name, kind in Survey.__annotations__.items() if kind is not np.ndarray)


def frames_around(frame_seconds: float) -> int:
    """Frames in a quarter of a second, 1 at least."""
    return max(1, round(0.25 / frame_seconds)) if frame_seconds > 0 else 1


def survey_source(
    info: ClipInfo, settings: SplitConfig, advance: Callable[[int], None], stop: threading.Event | None = None
) -> Survey:
    """Decode `info`'s file once, forward, and measure every frame. `advance(n)` is called now and then with frames done.

    Twice where the bars that stand throughout turn out to be others than a few key frames said.

    Raises ClipError where the file turns out damaged or cannot be measured, and where `stop` is set before the end.
    """
    _refuse_narrow(info)
    bars = _measurable(glimpsed_bars(info, _scaled(info, LINES)), info)
    survey = _measured(info, bars, settings, advance, stop)
    standing = _measurable(find_bars(survey.lit_rows, survey.lit_columns, info.width, info.height, inwards=0), info)
    if alike(bars, standing, info.width, info.height):
        return survey
    # A few key frames are only a guess: the bars came later, or all of them were dark. Rare, or this would cost too much.
    return _measured(info, standing, settings, lambda _: None, stop)


def _measurable(bars: Crop | None, info: ClipInfo) -> Crop | None:
    """The bars, or None where what is inside them is too narrow to be measured alone."""
    if bars is None:
        return None
    width, height = _scaled(info, THUMB)
    rows, columns = _inside(bars, info, width, height)
    return None if min(rows.stop - rows.start, columns.stop - columns.start) < _NARROWEST else bars


def _inside(bars: Crop, info: ClipInfo, width: int, height: int) -> tuple[slice, slice]:
    """The rows and columns inside `bars` of the picture scaled to `width` x `height`."""
    left, top, right, bottom = bars
    columns, rows = width / info.width, height / info.height
    return slice(round(top * rows), round(bottom * rows)), slice(round(left * columns), round(right * columns))


def _cropped(picture: np.ndarray, bars: Crop | None, info: ClipInfo) -> np.ndarray:
    if bars is None:
        return picture
    # Scaled before, as a whole: larger thumbnails of which the inside had 128 pixels again took half as long again.
    return np.ascontiguousarray(picture[_inside(bars, info, picture.shape[1], picture.shape[0])])


def _measured(
    info: ClipInfo, bars: Crop | None, settings: SplitConfig, advance: Callable[[int], None], stop: threading.Event | None
) -> Survey:
    """One pass, of what is inside `bars`."""
    measures = FrameMeasures(info.frame_seconds, settings)
    thumb, closer = _scaled(info, THUMB), _scaled(info, LINES)
    convert_thumb, convert_closer = VideoReformatter(), VideoReformatter()
    times: list[float] = []
    with unreadable_named(info.path), open_video(info.path) as (container, stream):
        stream.thread_type = "AUTO"  # three times as fast; what it makes uncertain, `is_corrupt`, is not asked here
        tick = float(stream.time_base or 0)
        # Interlaced frames as they are: in a thumbnail both fields have become one picture.
        for frame in container.decode(stream):
            time = _time(frame, tick, info, times)
            if time is None:
                continue
            times.append(time)
            with _unmeasurable_named(info.path):
                measures.add(_cropped(as_shown(info, frame, convert_thumb, size=thumb), bars, info))
                if measures.wants_a_look:
                    # Each shot's own bars are told from the whole picture: they may be wider than those that always stand.
                    whole = as_shown(info, frame, convert_closer, size=closer)
                    measures.look(_cropped(whole, bars, info), whole)
            if len(times) % _REPORT_EVERY == 0:
                advance(_REPORT_EVERY)
                if stop is not None and stop.is_set():
                    message = f"{info.path}: interrupted"
                    raise ClipError(message)
    if not times:
        message = f"{info.path}: no frame of it can be decoded; convert it again"
        raise ClipError(message)
    advance(len(times) % _REPORT_EVERY)
    duration = times[-1] + info.frame_seconds
    return Survey(info.width, info.height, info.frame_seconds, duration, np.array(times), **measures.finished())


@contextmanager
def _unmeasurable_named(path: Path) -> Iterator[None]:
    try:
        yield
    except cv2.error as error:
        message = f"{path}: its pictures cannot be measured ({' '.join(str(error).split())}); leave it out, and tell us"
        raise ClipError(message) from error


def _refuse_narrow(info: ClipInfo) -> None:
    if min(_scaled(info, THUMB)) < _NARROWEST:
        message = (
            f"{info.path}: a picture of {info.width}x{info.height} pixels is too small or too narrow to be measured; the short "
            f"side has to have {_NARROWEST} pixels or more, the long one {_LONGEST * THUMB // _NARROWEST} times as many at most"
        )
        raise ClipError(message)


def _time(frame: VideoFrame, tick: float, info: ClipInfo, before: list[float]) -> float | None:
    """Seconds from the first frame shown; None for frames an edit list hides before it."""
    if frame.pts is None:
        message = f"{info.path}: its time stamps are missing; convert it (ffmpeg -i IN OUT.mp4)"
        raise ClipError(message)
    time = frame.pts * tick - info.origin
    if time < -_SAME_TIME or (before and time <= before[-1]):
        return None
    return max(0.0, time)


def _scaled(info: ClipInfo, short: int) -> tuple[int, int]:
    """(width, height) of the picture as shown with `short` pixels on its short side; never enlarged."""
    scale = min(1.0, short / min(info.width, info.height), _LONGEST * short / max(info.width, info.height))
    return round(info.width * scale), round(info.height * scale)


def survey_key(path: Path, settings: SplitConfig) -> str:
    """Names the survey of this very file: by size, time of change and both ends of its content, and what shapes the survey."""
    stat = path.stat()
    with path.open("rb") as stream:
        head = stream.read(_EDGE_BYTES)
        stream.seek(max(0, stat.st_size - _EDGE_BYTES))
        ends = hashlib.sha256(head + stream.read()).hexdigest()
    shaped_by = [settings.cut_ratio, settings.cut_change]
    return digest_of([SCHEMA, THUMB, LINES, stat.st_size, stat.st_mtime_ns, ends, shaped_by])[:32]


def save_survey(path: Path, survey: Survey) -> None:
    """Atomically; what is there afterwards is whole."""
    arrays = {name: np.ascontiguousarray(getattr(survey, name)) for name in _ARRAYS}
    about = {"survey": json.dumps({name: getattr(survey, name) for name in _NUMBERS})}
    write_atomic(path, lambda temporary: save_file(arrays, temporary, metadata=about))


def load_survey(path: Path) -> Survey | None:
    """None where there is none, or none that is whole: it is made again."""
    try:
        with safe_open(path, framework="numpy") as file:
            about: Mapping[str, Any] = json.loads((file.metadata() or {}).get("survey", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (FileNotFoundError, SafetensorError, json.JSONDecodeError):
        return None
    if set(arrays) != set(_ARRAYS) or set(about) != set(_NUMBERS):
        return None
    return Survey(**about, **arrays)
