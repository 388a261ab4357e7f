"""Videos back to frames, ours and other people's: every frame as it is shown, none resampled."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter

from mochi_lora.data.probe import ClipInfo, open_video, probe, read_image, unreadable_named
from mochi_lora.data.shown import as_shown, progressive
from mochi_lora.errors import ClipError


@dataclass(frozen=True)
class Film:
    """A whole video in memory."""

    frames: np.ndarray  # uint8 [F, H, W, 3], full-range RGB
    fps: float  # frames per second (median interval); 0.0 for an image


def read_video(path: Path) -> Film:
    """Every frame of a video. Raises ClipError (a UserError) naming the file where it cannot be read whole."""
    info = probe(path)
    if info.is_image:
        return Film(read_image(path)[None], 0.0)
    frames = np.empty((len(info.times), info.height, info.width, 3), np.uint8)
    for index, frame in enumerate(decode(info)):
        frames[index] = frame
    return Film(frames, 1 / info.frame_seconds)


def decode(info: ClipInfo) -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3] of a probed video, as shown, as many as the probe counted. Raises ClipError.

    One thread decodes: a grid has dozens of videos open, and a decoder of its own wish takes every core for each.
    """
    count = 0
    convert = VideoReformatter()
    with unreadable_named(info.path), open_video(info.path) as (container, stream):
        stream.codec_context.thread_count = 1
        for frame in progressive(info, stream, container.decode(stream)):
            if frame.is_corrupt or count == len(info.times):
                break
            yield as_shown(info, frame, convert)
            count += 1
    if count != len(info.times):
        raise ClipError(f"{info.path}: frame {count} of {len(info.times)} cannot be decoded; copy or make the file again")
