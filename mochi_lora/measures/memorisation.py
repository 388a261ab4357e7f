"""Does a generated clip replay a training clip: nearest neighbours, and the similarity from which on it is a copy.

Narrow data sets make all their clips alike; a copy shares the very pixels' places. Hence two decisions, both measured on
drawn clips (a set of 1 to 40, imperfect copies of its clips, new clips of the same words, new clips of other words):

- The descriptor keeps places. A classifier's pooled features give copies and new clips of the same words the same
  similarity; `layout`, a thumbnail, keeps them apart at every size of the set.
- The threshold lies half-way between how alike different clips are and how alike neighbouring frames of one clip are.
  At the 99th percentile of the former itself, a third of the clips of other words was flagged with one training clip, a
  tenth with eight: of n numbers it is their maximum, which chance exceeds once in n + 1. Half-way flagged all copies but
  one in 500, at most 4 % of the clips of other words, and of those of the same words, some of which nearly coincide,
  30 % with one training clip, 12 % with three, 3 % with forty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mochi_lora.measures.similarity import checked

_THUMBNAIL = (24, 16)  # width, height: coarse enough for a decoder's blur, fine enough for the place of an object
_FLAT = 1.0  # grey levels of contrast (root mean square): below, a thumbnail would be normalised codec noise
_NEXT = slice(1, 5)  # the second to fifth nearest
_FLOOR = 0.1  # of similarities in a ratio: below, clips are unrelated, and how unrelated means nothing
_PERCENTILE = 0.99


@dataclass(frozen=True)
class Nearest:
    """The training clip nearest to a generated one."""

    clip: int  # index of the training clip
    similarity: float  # `clip_similarity`
    ratio: float  # similarity / mean of the second to fifth nearest, both at least 0.1; 1 with a single training clip
    frame: int  # of the generated clip and
    training_frame: int  # of the training clip: the most similar pair of frames


def layout(frames: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3] -> float32 [F, 1152]: thumbnails of 24 x 16 without their mean colour, length 1.

    Blind to brightness, contrast, blur and resolution; sees where things are and how their colours differ. Frames of one
    colour give zeros. Not for cropped copies: generators replay whole frames.
    """
    assert frames.dtype == np.uint8, f"expected uint8, got {frames.dtype}"
    assert frames.ndim == 4, f"expected [F, H, W, 3], got {frames.shape}"
    small = np.stack([cv2.resize(frame, _THUMBNAIL, interpolation=cv2.INTER_AREA) for frame in frames]).astype(np.float32)
    rows = (small - small.mean(axis=(1, 2), keepdims=True)).reshape(len(frames), -1)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    flat = lengths < _FLAT * np.sqrt(rows.shape[1])
    return np.where(flat, 0, rows / np.where(flat, 1, lengths)).astype(np.float32)


def clip_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the frames of `a` [F, D] of the highest cosine with a frame of `b` [G, D]; in [-1, 1], not symmetric.

    Best match and not frame by frame: a replay may be faster, slower or shifted in time.
    """
    return _best_matches(checked(a, blank=True), checked(b, blank=True))


def nearest(clip: np.ndarray, training: Sequence[np.ndarray]) -> Nearest:
    """The nearest of the `training` clips ([G, D] each, at least one) to `clip` [F, D]."""
    assert training, "no training clips"
    rows = checked(clip, blank=True)
    references = [checked(other, blank=True) for other in training]
    similarities = np.array([_best_matches(rows, other) for other in references])
    best = int(similarities.argmax())
    pairs = rows @ references[best].T
    frame, training_frame = np.unravel_index(pairs.argmax(), pairs.shape)
    rest = np.sort(similarities)[::-1][_NEXT]
    ratio = max(similarities[best], _FLOOR) / max(rest.mean(), _FLOOR) if rest.size else 1.0
    return Nearest(best, float(similarities[best]), float(ratio), int(frame), int(training_frame))


def leave_one_out(training: Sequence[np.ndarray]) -> np.ndarray:
    """Similarity of each training clip to the nearest other one, float64 [n]; n >= 2."""
    assert len(training) >= 2, f"{len(training)} training clips have no others"
    return _between(training).max(axis=1)


def copy_threshold(training: Sequence[np.ndarray], base_similarities: Sequence[float]) -> float:
    """Similarity above which a clip is a copy of a training clip.

    `base_similarities` are the base model's clips' (`nearest(...).similarity`): the base cannot have memorised. One training
    clip needs them, because it has no others to differ from.

    "Different" is the 99th percentile of `leave_one_out` or of the base, whichever is higher; "copy" is the median over
    training clips of the similarity of their even to their odd frames (1 for clips of one frame). The threshold is half-way,
    and never below "different". Training clips at least as alike as "copy" are one piece of footage (overlapping cuts,
    duplicates) and do not count as different: they would lift the threshold to 1, where nothing is ever flagged.
    """
    assert training, "no training clips"
    copy = float(np.median([_even_to_odd(checked(clip, blank=True)) for clip in training]))
    between = _between(training)
    different = np.where(between < copy, between, -np.inf).max(axis=1)
    different = different[np.isfinite(different)]
    levels = [float(np.quantile(values, _PERCENTILE)) for values in (different, np.asarray(base_similarities)) if len(values)]
    assert levels, "nothing shows how alike different clips are: training clips are one piece of footage, and no base clips"
    highest = max(levels)
    return max(highest, (highest + copy) / 2)


def _best_matches(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape[1] == b.shape[1], f"embeddings of different networks: {a.shape[1]} and {b.shape[1]} dimensions"
    return float((a @ b.T).max(axis=1).mean())


def _between(training: Sequence[np.ndarray]) -> np.ndarray:
    """Similarity of every training clip to every other, float64 [n, n]; minus infinity on the diagonal."""
    clips = [checked(clip, blank=True) for clip in training]
    similarities = np.array([[_best_matches(one, other) for other in clips] for one in clips])
    np.fill_diagonal(similarities, -np.inf)
    return similarities


def _even_to_odd(rows: np.ndarray) -> float:
    return _best_matches(rows[::2], rows[1::2]) if len(rows) > 1 else 1.0
