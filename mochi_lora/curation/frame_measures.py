"""The numbers of one frame after the other; pictures are forgotten a quarter of a second later.

Cuts are PySceneDetect's (AdaptiveDetector, scenedetect-headless 0.7.2), fed with our own thumbnails.
"""

from collections import deque

import cv2
import numpy as np
from scenedetect import AdaptiveDetector, FrameTimecode

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.bars import lit_lines

_LOOKS_PER_SECOND = 4
_FLOW_SECONDS = 1 / 8  # between the two frames whose flow is measured; VBench's rate of looking
_FASTEST = 0.05
_SMALL = 32  # pixels on each side of what hash, grid and mixes are made from: one reduction of the picture for all
_GRID = (8, 4)  # parts of the picture (columns, rows) whose brightness is followed for flicker
_MIX_SIZE = (8, 4)  # so coarse that what moves within a shot hardly shows, while another shot's colours do
_HASH_COEFFICIENTS = 8
_RATE = 30.0  # any: the detector is told frame numbers, and wants a rate to tell them with
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)


class FrameMeasures:
    """Feed every frame to `add` in order, and to `look` those after which `wants_a_look` is true."""

    def __init__(self, frame_seconds: float, settings: SplitConfig) -> None:
        seconds = frame_seconds if frame_seconds > 0 else 1 / _RATE
        self._detector = AdaptiveDetector(
            adaptive_threshold=settings.cut_ratio, min_content_val=settings.cut_change, min_scene_len=1
        )
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._flow.setFinestScale(1)
        self._step = max(1, round(1 / (_LOOKS_PER_SECOND * seconds)))
        self._apart = max(1, round(_FLOW_SECONDS / seconds))
        self._per_eighth = _FLOW_SECONDS / (self._apart * seconds)
        self._around = max(1, round(0.25 / seconds))
        self._greys: deque[np.ndarray] = deque(maxlen=self._apart + 1)
        self._mixes: deque[np.ndarray] = deque(maxlen=2 * self._around + 1)
        self._frames: list[tuple[float, float, float]] = []  # luma, contrast, change
        self._grids: list[np.ndarray] = []
        self._hashes: list[int] = []
        self._bends: list[tuple[float, float]] = []  # spread, bend of the frame `_around` before the last
        self._cuts: list[int] = []
        self._looks: list[int] = []
        self._motion: list[float] = []
        self._closer: list[tuple[float, np.ndarray, np.ndarray]] = []  # sharpness, lit rows, lit columns

    @property
    def wants_a_look(self) -> bool:
        """Whether the frame added last is one of those to be looked at more closely."""
        return (len(self._frames) - 1) % self._step == min(self._step - 1, self._apart)

    def add(self, picture: np.ndarray) -> None:
        """One thumbnail, uint8 [H, W, 3], RGB."""
        index = len(self._frames)
        found = self._detector.process_frame(FrameTimecode(index, _RATE), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        self._cuts += [cut.frame_num for cut in found]
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        mean, deviation = cv2.meanStdDev(grey)
        change = float(cv2.mean(cv2.absdiff(grey, self._greys[-1]))[0]) if self._greys else 0.0
        self._greys.append(grey)
        self._frames.append((float(mean[0, 0]), float(deviation[0, 0]), change))
        small = cv2.resize(picture, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA)
        small_grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
        self._grids.append(cv2.resize(small_grey, _GRID, interpolation=cv2.INTER_AREA).ravel())
        self._hashes.append(_hash(small_grey))
        self._mixes.append(cv2.resize(small, _MIX_SIZE, interpolation=cv2.INTER_AREA))
        if len(self._mixes) == self._mixes.maxlen:
            self._bends.append(_bend(self._mixes[0], self._mixes[self._around], self._mixes[-1]))

    def look(self, picture: np.ndarray, whole: np.ndarray) -> None:
        """The frame added last, uint8 [H, W, 3], RGB: what is inside standing bars (or all), and `whole` at 360 lines."""
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        self._looks.append(len(self._frames) - 1)
        self._motion.append(self._speed())
        rows, columns = lit_lines(grey if whole is picture else cv2.cvtColor(whole, cv2.COLOR_RGB2GRAY))
        _, deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_32F))
        self._closer.append((float(deviation[0, 0]) ** 2, rows, columns))

    def _speed(self) -> float:
        first, second = self._greys[0], self._greys[-1]
        if len(self._greys) < 2 or np.array_equal(first, second):
            return 0.0
        flow = self._flow.calc(first, second, np.zeros((*first.shape, 2), np.float32))
        speeds = np.sqrt((flow**2).sum(axis=2)).ravel()
        count = max(1, round(_FASTEST * speeds.size))
        fastest = float(np.partition(speeds, -count)[-count:].mean())
        eighth = self._per_eighth * self._apart / (len(self._greys) - 1)
        return fastest / min(first.shape) * 100 * eighth

    def finished(self) -> dict[str, np.ndarray]:
        """The arrays of a `Survey`, its times left out."""
        count = len(self._frames)
        assert count, "no frame was added"
        luma, contrast, change = np.array(self._frames, dtype=np.float32).T
        spread, bend = np.zeros(count, np.float32), np.ones(count, np.float32)
        if self._bends:
            inner = slice(self._around, self._around + len(self._bends))
            spread[inner], bend[inner] = np.array(self._bends, dtype=np.float32).T
        empty = (0.0, np.zeros(0, np.uint8), np.zeros(0, np.uint8))
        sharpness, rows, columns = zip(*self._closer or [empty], strict=True)
        looked = len(self._looks)
        return {
            "luma": luma.copy(),
            "contrast": contrast.copy(),
            "change": change.copy(),
            "swing": _swing(np.array(self._grids)),
            "spread": spread,
            "bend": bend,
            "hashes": np.array(self._hashes, dtype=np.uint64),
            "cuts": np.array(sorted(set(self._cuts)), dtype=np.int64),
            "looks": np.array(self._looks, dtype=np.int64),
            "motion": np.array(self._motion, dtype=np.float32),
            "sharpness": np.array(sharpness[:looked], dtype=np.float32),
            "lit_rows": np.stack(rows)[:looked],
            "lit_columns": np.stack(columns)[:looked],
        }


def picture_hash(grey: np.ndarray) -> int:
    """64 bits of a luma picture uint8 [H, W] that scaling and compression hardly change: signs of its slowest cosines.

    The 8 x 8 lowest DCT coefficients of 32 x 32 pixels, each above the median of all but the first or not (pHash, Zauner
    2010, section 3.2.1).
    """
    return _hash(cv2.resize(grey, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA).astype(np.float32))


def _hash(small: np.ndarray) -> int:
    low = cv2.dct(small)[:_HASH_COEFFICIENTS, :_HASH_COEFFICIENTS].ravel()
    return int(_BITS[low > np.median(low[1:])].sum(dtype=np.uint64))


def _bend(before: np.ndarray, now: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(spread, bend): in a fade or dissolve every frame is a mix of its neighbours; what moves is elsewhere in between."""
    spread = float(cv2.absdiff(before, after).mean())
    off = float(cv2.absdiff(now, cv2.addWeighted(before, 0.5, after, 0.5, 0)).mean())
    return spread, off / max(spread, 1.0)


def _swing(grids: np.ndarray) -> np.ndarray:
    """float32 [N] from the brightness [N, parts]: a quarter of the second difference that most parts share.

    For a light that alternates by +-a it is a. What moves changes some parts, and neighbours in opposite ways, so the
    median over the parts does not see it; neither does it see steady brightening.
    """
    swing = np.zeros(len(grids), np.float32)
    if len(grids) > 2:
        swing[1:-1] = np.abs(np.median(grids[:-2] - 2 * grids[1:-1] + grids[2:], axis=1)) / 4
    return swing
