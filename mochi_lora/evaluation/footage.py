"""The clips under measurement and those they are measured against: read when needed, looked at once, remembered."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from mochi_lora.console import console
from mochi_lora.data.geometry import shown_size
from mochi_lora.data.probe import probe, read_image
from mochi_lora.data.sources import ClipSource, Found
from mochi_lora.errors import ClipError
from mochi_lora.inference.playback import decode
from mochi_lora.measures.encoders import Aligner, ImageEncoder, choose_frames
from mochi_lora.measures.features import FeatureCache
from mochi_lora.measures.flow import ClipMotion, measure_motion
from mochi_lora.measures.memorisation import thumbnails

_FEWEST_FOR_MOTION = 3
# How alike neighbouring frames are tells a copy: measured on drawn clips, of 4 frames every fifth healthy clip was flagged,
# of 8 none, and from 16 on the threshold stays.
_FEWEST_FOR_LAYOUTS = 16
_T = TypeVar("_T")


@dataclass(frozen=True)
class Clip:
    """A whole video, or the frames [first, last) of one."""

    path: Path
    fps: float  # 0 for an image
    first: int
    last: int
    caption: str = ""
    crop: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels as shown; None is all

    @classmethod
    def open(cls, path: Path) -> "Clip":
        """Probe a whole video. Raises ClipError naming the file."""
        return cls.of(ClipSource(path, ""))

    @classmethod
    def of(cls, source: ClipSource) -> "Clip":
        """Probe a clip of a data set. Raises ClipError naming the file where there are no such frames or pixels."""
        path, start, end = source.path, source.start, source.end
        info = probe(path)
        shown_size(info, source)  # checks the crop
        if info.is_image:
            return cls(path, 0.0, 0, 1, source.caption, source.crop)
        fps, count = 1 / info.frame_seconds, len(info.times)
        first, last = round(start * fps), count if end is None else min(count, round(end * fps))
        if first >= last:
            raise ClipError(
                f"{path}: no frame between {start} s and {end} s of {count / fps:.1f} s; mend the range in the table"
            )
        return cls(path, fps, first, last, source.caption, source.crop)

    @property
    def name(self) -> str:
        """For people, with its folder: numbered clips of two folders have the same names."""
        name = f"{self.path.resolve().parent.name}/{self.path.name}"
        return f"{name}@{self.first / self.fps:g}s" if self.first else name

    @property
    def aspect(self) -> float:
        """Width / height of what is seen of it."""
        info = probe(self.path)
        left, top, right, bottom = self.crop or (0, 0, info.width, info.height)
        return (right - left) / (bottom - top)

    def region(self) -> dict[str, object]:
        """The crop, for names of what is remembered; nothing where there is none."""
        return {"region": list(self.crop)} if self.crop else {}

    def frames(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """uint8 [F, H, W, 3], all or the increasing `indices` of it. Raises ClipError naming the file.

        Of a range in a long film no more is in memory than is asked for, and nothing after it is decoded.
        """
        info = probe(self.path)
        if info.is_image:
            return self._cut(read_image(self.path)[None])
        wanted = [self.first + index for index in (range(self.last - self.first) if indices is None else indices)]
        found = np.empty((len(wanted), info.height, info.width, 3), np.uint8)
        at = 0
        for number, frame in enumerate(decode(info)):
            if number == wanted[at]:
                found[at] = frame
                at += 1
                if at == len(wanted):
                    break
        assert at == len(wanted), f"{self.path}: frames {wanted} of a clip that ends before"
        return self._cut(found)

    def _cut(self, frames: np.ndarray) -> np.ndarray:
        left, top, right, bottom = self.crop or (0, 0, frames.shape[2], frames.shape[1])
        return frames[:, top:bottom, left:right]

    def chosen(self, wanted: int) -> list[int]:
        """Indices into `frames()` of `wanted` evenly spaced ones."""
        return choose_frames(self.last - self.first, wanted)


class Share(Protocol):
    """Who works where several processes measure together."""

    def __call__(self, works: Sequence[Callable[[], _T]]) -> list[_T]:
        """What each of `works` gives, in their order; every process is told all of it."""
        ...


def alone(works: Sequence[Callable[[], _T]]) -> list[_T]:
    """One process does it all."""
    return [work() for work in works]


@dataclass(frozen=True)
class Footage:
    """How clips are looked at: how many frames, where results are remembered, and by whom. `step` is called after each look
    of this process.
    """

    cache: FeatureCache
    frames_per_clip: int
    step: Callable[[], None] = lambda: None
    share: Share = alone

    def embed(self, encoder: ImageEncoder, clips: Iterable[Clip]) -> list[np.ndarray]:
        """Per clip float32 [f, D], rows of length 1, of its evenly spaced frames."""
        return self.each([partial(self._embedded, encoder, clip) for clip in clips])

    def align(self, aligner: Aligner, clips: Sequence[Clip], prompts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Per clip float32 [P], its score with each of its own `prompts`."""
        pairs = zip(clips, prompts, strict=True)
        return self.each(
            [partial(self.cache.alignment, aligner, clip.path, clip.fps, told, clip.frames) for clip, told in pairs]
        )

    def motion(self, clips: Iterable[Clip]) -> list[ClipMotion | None]:
        """Per clip what its optical flow says; None for clips of fewer than three frames."""
        return self.each([partial(self._motion, clip) for clip in clips])

    def thumbnails(self, clips: Iterable[Clip], aspect: float) -> list[np.ndarray]:
        """Per clip float32 [f, 32, 48, 3], of its middle in that shape (`measures.memorisation.thumbnails`)."""
        return self.each([partial(self._thumbnails, clip, aspect) for clip in clips])

    def each(self, looks: Sequence[Callable[[], _T]]) -> list[_T]:
        """What each look finds, counted."""
        return self.share([partial(self._counted, look) for look in looks])

    def _counted(self, look: Callable[[], _T]) -> _T:
        found = look()
        self.step()
        return found

    def _embedded(self, encoder: ImageEncoder, clip: Clip) -> np.ndarray:
        indices = clip.chosen(self.frames_per_clip)
        shown = [clip.first + index for index in indices]
        return self.cache.embeddings(encoder, clip.path, shown, lambda: clip.frames(indices), clip.crop)

    def layout_frames(self, clip: Clip) -> list[int]:
        """Indices into `clip.frames()` of what `thumbnails` looks at."""
        return clip.chosen(max(_FEWEST_FOR_LAYOUTS, self.frames_per_clip))

    def _thumbnails(self, clip: Clip, aspect: float) -> np.ndarray:
        indices = self.layout_frames(clip)
        frames = [clip.first + index for index in indices]
        key = {"kind": "thumbnails", "frames": frames, "aspect": round(aspect, 3), **clip.region()}
        return self.cache.values(clip.path, key, lambda: thumbnails(clip.frames(indices), round(aspect, 3)))

    def _motion(self, clip: Clip) -> ClipMotion | None:
        if clip.last - clip.first < _FEWEST_FOR_MOTION or not clip.fps:
            return None

        def compute() -> np.ndarray:
            found = measure_motion(clip.frames(), clip.fps)
            numbers = [found.warp_error, found.motion_amount, found.motion_smoothness]
            return np.concatenate([np.array(numbers, np.float32), found.directions])

        warp, amount, smoothness, *directions = self.cache.values(
            clip.path, {"kind": "motion", "first": clip.first, "last": clip.last, **clip.region()}, compute
        )
        return ClipMotion(float(warp), float(amount), float(smoothness), np.array(directions, np.float32))


def clips_of(found: Found) -> tuple[list[Clip], int]:
    """The clips of a data set that can be used, in order, and how many cannot; those are told by name."""
    sources, rejections = found
    for rejection in rejections:
        console.print(f"left out: {rejection.name}: {rejection.reason}", style="yellow", markup=False)
    clips, unreadable = [], len(rejections)
    for source in sources:
        try:
            clips.append(Clip.of(source))
        except ClipError as error:
            console.print(f"left out: {error}", style="yellow", markup=False)
            unreadable += 1
    return clips, unreadable
