"""Does a generated clip replay a training clip: nearest neighbours, and the similarity from which on it is a copy.

Narrow data sets make all their clips alike; a copy shares the very pixels' places. Hence three decisions, measured on drawn
clips (a set of 1 to 40, imperfect copies of its clips, new clips of the same words, new clips of other words) and on real ones
(`tests/test_right_signs.py`):

- The descriptor keeps places. A classifier's pooled features give copies and new clips of the same words the same
  similarity; `layout`, a thumbnail, keeps them apart at every size of the set.
- Of the training clips nearest by whole frames, the part is looked for that the clip shows, down to four fifths of a side: a
  real copy that shows nine tenths of each side of its original has a similarity of 0.86 by whole frames, below the threshold
  of its set, and 0.998 by its part. A part counts only where it is all but the same pictures: the search also lays an object
  over itself that is merely near its place, and would flag 12 % instead of 6 % of the clips of the same words.
- The threshold lies half-way between how alike different clips are and how alike neighbouring frames of one clip are.
  At the 99th percentile of the former itself, a third of the clips of other words was flagged with one training clip, a
  tenth with eight: of n numbers it is their maximum, which chance exceeds once in n + 1. Half-way, with sets of 1, 8 and 40:
  all 196 copies were flagged, 183 of 196 cropped ones, 4 of 480 clips of other words, 12 of 196 of the same words.

Shape legend: F, G frames; n training clips; thumbnails are float32 [F, 32, 48, 3], layouts float32 [F, 1152].
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from mochi_lora.measures.similarity import checked

_WIDTH, _HEIGHT = 24, 16  # of a layout: coarse enough for a decoder's blur, fine enough for the place of an object
_FINER = 2  # thumbnails have so many pixels per one of a layout and side: parts of them are cut out in fractions
_FLAT = 1.0  # grey levels of contrast (root mean square): below, a layout would be normalised codec noise
_NEXT = slice(1, 5)  # the second to fifth nearest
_FLOOR = 0.1  # of similarities in a ratio: below, clips are unrelated, and how unrelated means nothing
_PERCENTILE = 0.99
_SEARCHED = 5  # nearest by whole frames
_Part = tuple[float, float, float]  # left, top, size: shares of the sides
_LEAST = 0.8  # of a side that a copy shows
_SAME = 0.95  # similarity from which on a part counts
_GRID: tuple[_Part, ...] = (
    (0.0, 0.0, 1.0),
    *((x * (1 - size) / 2, y * (1 - size) / 2, size) for size in (0.9, _LEAST) for x in range(3) for y in range(3)),
)
_STEPS = (0.05, 0.025)  # of the part's size and place, after the grid
_JUDGED = 4  # frames by which parts are chosen


@dataclass(frozen=True)
class Nearest:
    """The training clip nearest to a generated one."""

    clip: int  # index of the training clip
    similarity: float  # `clip_similarity`, of the best part
    ratio: float  # `ratio_to_next`
    frame: int  # of the generated clip and
    training_frame: int  # of the training clip: the most similar pair of frames


@dataclass(frozen=True)
class Gallery:
    """Training clips ready to be compared with."""

    thumbnails: tuple[np.ndarray, ...]  # [G, 32, 48, 3] each
    rows: np.ndarray  # layouts of all whole frames, clip after clip: [sum of G, 1152]
    starts: np.ndarray  # first row of each clip

    @classmethod
    def of(cls, thumbnails: Sequence[np.ndarray]) -> "Gallery":
        """At least one clip."""
        assert thumbnails, "no training clips"
        counts = [len(clip) for clip in thumbnails]
        return cls(tuple(thumbnails), np.concatenate([layout(clip) for clip in thumbnails]), np.cumsum([0, *counts[:-1]]))


def thumbnails(frames: np.ndarray, aspect: float | None = None) -> np.ndarray:
    """uint8 [F, H, W, 3] -> float32 [F, 32, 48, 3], of the middle of the picture that is `aspect` times as wide as high.

    The data pipeline cuts the same middle out of a training clip, so it is all that a model can have learnt of it.
    """
    assert frames.dtype == np.uint8, f"expected uint8, got {frames.dtype}"
    assert frames.ndim == 4, f"expected [F, H, W, 3], got {frames.shape}"
    height, width = frames.shape[1:3]
    aspect = aspect or width / height
    wide, high = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - wide) // 2, (height - high) // 2
    size = (_WIDTH * _FINER, _HEIGHT * _FINER)
    middle = frames[:, top : top + high, left : left + wide]
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in middle]).astype(np.float32)


def layout(clip: np.ndarray, left: float = 0.0, top: float = 0.0, size: float = 1.0) -> np.ndarray:
    """Thumbnails -> float32 [F, 1152]: pixels of 24 x 16 without their mean colour, length 1, of a part of the frames.

    `left`, `top` and `size` are shares of the sides. Blind to brightness, contrast, blur and resolution; sees where things
    are and how their colours differ. Frames of one colour give zeros.
    """
    frames, high, wide, _ = clip.shape
    small = _averaging(_HEIGHT, high, top, size) @ clip.reshape(frames, high, wide * 3)
    small = (_averaging(_WIDTH, wide, left, size) @ small.reshape(frames, _HEIGHT, wide, 3)).reshape(frames, -1, 3)
    rows = (small - _averaging(1, small.shape[1], 0.0, 1.0) @ small).reshape(frames, -1)  # thrice as fast as numpy's mean
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    flat = lengths < _FLAT * np.sqrt(rows.shape[1])
    return np.where(flat, 0, rows / np.where(flat, 1, lengths)).astype(np.float32)


def clip_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the frames of `a` [F, D] of the highest cosine with a frame of `b` [G, D]; in [-1, 1], not symmetric.

    Best match and not frame by frame: a replay may be faster, slower or shifted in time.
    """
    rows, others = checked(a, blank=True), checked(b, blank=True)
    assert rows.shape[1] == others.shape[1], f"embeddings of different networks: {a.shape[1]} and {b.shape[1]} dimensions"
    return float((rows @ others.T).max(axis=1).mean())


def nearest(clip: np.ndarray, training: Gallery) -> Nearest:
    """The training clip nearest to the thumbnails `clip`."""
    rows = layout(clip)
    similarities = _similarities(rows, training)
    best = int(similarities.argmax())
    pairs = rows @ _best_part(rows, training.thumbnails[best]).T
    frame, training_frame = np.unravel_index(pairs.argmax(), pairs.shape)
    return Nearest(best, float(similarities[best]), ratio_to_next(similarities), int(frame), int(training_frame))


def ratio_to_next(similarities: np.ndarray) -> float:
    """The highest / the mean of the second to fifth, both at least 0.1; 1 where there is one alone."""
    ordered = np.sort(similarities)[::-1]
    rest = ordered[_NEXT]
    return float(max(ordered[0], _FLOOR) / max(rest.mean(), _FLOOR)) if rest.size else 1.0


def between(training: Gallery, own: int) -> np.ndarray:
    """Similarity of training clip `own` to every one, float64 [n]; minus infinity to itself."""
    return _similarities(layout(training.thumbnails[own]), training, own)


def even_to_odd(clip: np.ndarray) -> float:
    """Similarity of a clip's even to its odd frames: how alike two looks at one clip are. 1 for a clip of one frame."""
    rows = layout(clip)
    return clip_similarity(rows[::2], rows[1::2]) if len(rows) > 1 else 1.0


def copy_threshold(among: np.ndarray, halves: Sequence[float], base: Sequence[float]) -> float | None:
    """Similarity above which a clip is a copy of a training clip; None where nothing shows how alike different clips are.

    `among` [n, n] is `between` of every training clip, `halves` [n] its `even_to_odd`, `base` the similarities of the base
    model's clips to their nearest ones: the base cannot have memorised. One training clip needs them, because it has no
    others to differ from.

    "Different" is the 99th percentile of each training clip's similarity to the nearest other one, or of the base,
    whichever is higher; "copy" is the median of `halves`. The threshold is half-way, and never below "different". Training
    clips at least as alike as "copy" are one piece of footage (overlapping cuts, duplicates) and do not count as different:
    they would lift the threshold to 1, where nothing is ever flagged.
    """
    copy = float(np.median(halves))
    different = np.where(among < copy, among, -np.inf).max(axis=1)
    different = different[np.isfinite(different)]
    levels = [float(np.quantile(values, _PERCENTILE)) for values in (different, np.asarray(base)) if len(values)]
    if not levels:
        return None
    highest = max(levels)
    return max(highest, (highest + copy) / 2)


def _similarities(rows: np.ndarray, training: Gallery, own: int | None = None) -> np.ndarray:
    """Of the layouts `rows` to every training clip, float64 [n]; to the best part of the five nearest, where that counts."""
    found = np.maximum.reduceat(rows @ training.rows.T, training.starts, axis=1).mean(axis=0).astype(np.float64)
    if own is not None:
        found[own] = -np.inf
    for clip in np.argsort(-found)[:_SEARCHED]:
        if clip == own:
            continue
        part = clip_similarity(rows, _best_part(rows, training.thumbnails[clip]))
        if part >= _SAME:
            found[clip] = max(found[clip], part)
    return found


def _best_part(rows: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """Layouts of the part of `clip` (thumbnails) that is most like `rows`: from a coarse grid in ever smaller steps.

    A few frames of `rows` choose the part, each by its best match; in the grid by the best of all frames, since in the whole
    frame another moment may look nearer.
    """
    asked = rows[np.linspace(0, len(rows) - 1, min(_JUDGED, len(rows))).round().astype(int)]
    tried = {part: asked @ layout(clip, *part).T for part in _GRID}
    best = max(tried, key=lambda part: tried[part].max(axis=1).sum())
    twins = clip[tried[best].argmax(axis=1)]
    for step in _STEPS:
        best = max(_around(best, step), key=lambda part: (asked * layout(twins, *part)).sum())
    return layout(clip, *best)


def _around(part: _Part, step: float) -> list[_Part]:
    """`part`, and those a step smaller or larger and half a step beside it that lie in the picture."""
    left, top, size = part
    found = [part]
    for right, down, larger in itertools.product((-1, 0, 1), repeat=3):
        new = size + larger * step
        corners = left + (step * right + size - new) / 2, top + (step * down + size - new) / 2
        if _LEAST <= round(new, 6) <= 1 and all(0 <= round(corner, 6) <= round(1 - new, 6) for corner in corners):
            found.append((*corners, new))
    return found


@lru_cache(maxsize=4096)  # the steps lead to the same few hundred parts
def _averaging(cells: int, pixels: int, start: float, size: float) -> np.ndarray:
    """float32 [cells, pixels]: each cell the mean of its share of [start, start + size) of the pixels, edges in fractions."""
    first = start + size * np.arange(cells) / cells
    edges = np.arange(pixels + 1) / pixels
    shared = np.minimum(first[:, None] + size / cells, edges[None, 1:]) - np.maximum(first[:, None], edges[None, :-1])
    weights = np.clip(shared, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
