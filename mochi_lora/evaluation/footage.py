"""The clips under measurement and those they are measured against: read when needed, looked at once, remembered."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from mochi_lora.console import console
from mochi_lora.data.probe import probe
from mochi_lora.data.sources import list_sources
from mochi_lora.errors import ClipError
from mochi_lora.inference.playback import read_video
from mochi_lora.measures.encoders import Aligner, ImageEncoder, choose_frames
from mochi_lora.measures.features import FeatureCache
from mochi_lora.measures.flow import ClipMotion, measure_motion
from mochi_lora.measures.memorisation import layout

_FEWEST_FOR_MOTION = 3
_T = TypeVar("_T")


@dataclass(frozen=True)
class Clip:
    """A whole video, or the frames [first, last) of one."""

    path: Path
    fps: float  # 0 for an image
    first: int
    last: int
    caption: str = ""

    @classmethod
    def open(cls, path: Path, caption: str = "", start: float = 0.0, end: float | None = None) -> "Clip":
        """Probe a video; `start` and `end` in seconds. Raises ClipError naming the file where there are no such frames."""
        info = probe(path)
        if info.is_image:
            return cls(path, 0.0, 0, 1, caption)
        fps, count = 1 / info.frame_seconds, len(info.times)
        first, last = round(start * fps), count if end is None else min(count, round(end * fps))
        if first >= last:
            raise ClipError(
                f"{path}: no frame between {start} s and {end} s of {count / fps:.1f} s; mend the range in the table"
            )
        return cls(path, fps, first, last, caption)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.path.name}@{self.first / self.fps:g}s" if self.first else self.path.name

    def frames(self) -> np.ndarray:
        """uint8 [F, H, W, 3]. Raises ClipError naming the file."""
        return read_video(self.path).frames[self.first : self.last]

    def chosen(self, wanted: int) -> list[int]:
        """Indices into `frames()` of `wanted` evenly spaced ones."""
        return choose_frames(self.last - self.first, wanted)


@dataclass(frozen=True)
class Footage:
    """How clips are looked at: how many frames, and where results are remembered. `step` is called after each look."""

    cache: FeatureCache
    frames_per_clip: int
    step: Callable[[], None] = lambda: None

    def embed(self, encoder: ImageEncoder, clips: Iterable[Clip]) -> list[np.ndarray]:
        """Per clip float32 [f, D], rows of length 1, of its evenly spaced frames."""
        return [self._looked(partial(self._embedded, encoder, clip)) for clip in clips]

    def align(self, aligner: Aligner, clips: Sequence[Clip], prompts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Per clip float32 [P], its score with each of its own `prompts`."""
        pairs = zip(clips, prompts, strict=True)
        return [
            self._looked(partial(self.cache.alignment, aligner, clip.path, clip.fps, told, clip.frames)) for clip, told in pairs
        ]

    def motion(self, clips: Iterable[Clip]) -> list[ClipMotion | None]:
        """Per clip what its optical flow says; None for clips of fewer than three frames."""
        return [self._looked(partial(self._motion, clip)) for clip in clips]

    def layouts(self, clips: Iterable[Clip]) -> list[np.ndarray]:
        """Per clip float32 [f, 1152]: thumbnails that show where things are (`measures.memorisation.layout`)."""
        return [self._looked(partial(self._layout, clip)) for clip in clips]

    def _looked(self, look: Callable[[], _T]) -> _T:
        found = look()
        self.step()
        return found

    def _embedded(self, encoder: ImageEncoder, clip: Clip) -> np.ndarray:
        indices = clip.chosen(self.frames_per_clip)
        shown = [clip.first + index for index in indices]
        return self.cache.embeddings(encoder, clip.path, shown, lambda: clip.frames()[indices])

    def _layout(self, clip: Clip) -> np.ndarray:
        indices = clip.chosen(self.frames_per_clip)
        key = {"kind": "layout", "frames": [clip.first + index for index in indices]}
        return self.cache.values(clip.path, key, lambda: layout(clip.frames()[indices]))

    def _motion(self, clip: Clip) -> ClipMotion | None:
        if clip.last - clip.first < _FEWEST_FOR_MOTION or not clip.fps:
            return None

        def compute() -> np.ndarray:
            found = measure_motion(clip.frames(), clip.fps)
            numbers = [found.warp_error, found.motion_amount, found.motion_smoothness]
            return np.concatenate([np.array(numbers, np.float32), found.directions])

        warp, amount, smoothness, *directions = self.cache.values(
            clip.path, {"kind": "motion", "first": clip.first, "last": clip.last}, compute
        )
        return ClipMotion(float(warp), float(amount), float(smoothness), np.array(directions, np.float32))


def clips_of(data: Path) -> tuple[list[Clip], int]:
    """The clips of a data set that can be read, in order, and how many cannot. Raises UserError where nothing can be listed."""
    sources, rejections = list_sources(data)
    clips, unreadable = [], len(rejections)
    for source in sources:
        try:
            clips.append(Clip.open(source.path, source.caption, source.start, source.end))
        except ClipError as error:
            console.print(f"left out: {error}", style="yellow", markup=False)
            unreadable += 1
    return clips, unreadable
