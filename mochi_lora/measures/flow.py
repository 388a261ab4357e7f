"""Optical flow and what follows from it: flicker, the amount and smoothness of motion, and where things went when.

OpenCV's DIS (Kroeger et al., 1603.03590, preset medium): no weights, a few milliseconds a pair, the same bytes every time.

Shape legend: F frames of H x W pixels, uint8 RGB; a flow is float32 [H, W, 2], (x, y) in pixels: what is at p in the first
picture is at p + flow(p) in the second.
"""

from dataclasses import dataclass

import cv2
import numpy as np

# DIS matches 8 x 8 patches on a pyramid and stops one level short of full size: of a 64 x 96 picture it would see 12 x 8
# patches a level up, and small objects vanish between them. Enlarging first costs less than the flow itself.
_SHORT_SIDE = 128
_CONSISTENT, _SLACK = 0.01, 0.5  # |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5 where flow is sound (Sundaram et al., ECCV 2010)
_MOSTLY = 0.5  # of the pixels must agree for the rest to count as hidden
_AROUND, _EXPLAINED = 1 / 8, 0.7  # of the short side; what may be left of the difference around a moving pixel
_FASTEST = 0.05  # VBench's dynamic degree looks at the same share
_PER_SECOND = 8  # motion is told per 1/8 s, VBench's rate of looking
_STILL = 0.0005  # of the short side per frame: slower is codec noise, whose direction means nothing
_TIMES, _PLACES, _WAYS = 4, 3, 8  # the grid of `directions`: quarters of the clip, 3 x 3 tiles, 45 degrees each


@dataclass(frozen=True)
class ClipMotion:
    """How the picture of one clip moves."""

    warp_error: float  # [0, 1]
    motion_amount: float  # percent of the short side per 1/8 s, >= 0
    motion_smoothness: float  # [0, 1]
    directions: np.ndarray  # float32 [288], L2-normalised; all zeros where nothing moves


def dense_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Flow float32 [H, W, 2] from `first` to `second`, both uint8 [H, W, 3]; exactly 0 between equal pictures."""
    return _flow(_grey(first), _grey(second), first.shape[:2])


def measure_motion(frames: np.ndarray, fps: float) -> ClipMotion:
    """All of `ClipMotion` for uint8 [F, H, W, 3] at `fps` frames per second; F >= 3.

    Amount and directions count only flow that is the same there and back and explains the difference it claims to: a clip
    of noise, or a cut, has hardly any motion and a large warp error.
    """
    assert frames.dtype == np.uint8, f"expected uint8, got {frames.dtype}"
    assert frames.ndim == 4, f"expected [F, H, W, 3], got {frames.shape}"
    assert frames.shape[3] == 3, f"expected [F, H, W, 3], got {frames.shape}"
    assert len(frames) >= 3, f"motion needs three frames, got {len(frames)}"
    assert fps > 0, f"fps {fps}"
    short = min(frames.shape[1:3])
    errors, speeds = [], []
    directions = np.zeros((_TIMES, _PLACES, _PLACES, _WAYS))
    greys = [_grey(frame) for frame in frames]
    size, pairs = frames.shape[1:3], len(frames) - 1
    for index in range(pairs):
        forward = _flow(greys[index], greys[index + 1], size)
        backward = _flow(greys[index + 1], greys[index], size)
        sound = _sound(forward, backward)
        difference, residual = _differences(frames[index], frames[index + 1], forward)
        errors.append(residual[sound].mean() / 255)
        moved = forward * (sound & _explains(difference, residual))[..., None]
        speeds.append(_top_speed(moved[sound]) / short)
        directions[index * _TIMES // pairs] += _ways(moved, short)
    return ClipMotion(
        warp_error=float(np.mean(errors)),
        motion_amount=float(np.mean(speeds) * 100 * fps / _PER_SECOND),
        motion_smoothness=_smoothness(frames, greys),
        directions=_normalised(directions.ravel()),
    )


def _grey(frame: np.ndarray) -> np.ndarray:
    """Luma uint8, enlarged where the short side is below what DIS needs."""
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    scale = _SHORT_SIDE / min(grey.shape)
    if scale <= 1:
        return grey
    height, width = (round(side * scale) for side in grey.shape)
    return cv2.resize(grey, (width, height), interpolation=cv2.INTER_CUBIC)


def _flow(first: np.ndarray, second: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Flow between two of `_grey`'s pictures, at `size` = (H, W)."""
    # An initial flow is one more candidate for every patch at every level. "Does not move" as such a candidate keeps plain
    # ground, which fits anywhere, from drifting along with what moves beside it: a third of the flow over a plain wall.
    start = np.zeros((*first.shape, 2), np.float32)
    flow = np.asarray(cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(first, second, start), np.float32)
    if flow.shape[:2] == tuple(size):
        return flow
    height, width = size
    shrink = np.array([width / flow.shape[1], height / flow.shape[0]], np.float32)
    return cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) * shrink


def _follow(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """picture(p + flow(p)) for every p, bilinear; beyond the edge the edge's pixel."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(picture, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _sound(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """bool [H, W]: where the way there and back ends where it began, inside the picture.

    Elsewhere content is hidden, or the flow is a guess: beside an object on a plain wall, guesses doubled the motion amount.
    """
    back = _follow(backward, forward)
    gap = np.square(forward + back).sum(axis=2)
    length = np.square(forward).sum(axis=2) + np.square(back).sum(axis=2)
    height, width = forward.shape[:2]
    y, x = np.mgrid[:height, :width]
    x, y = x + forward[..., 0], y + forward[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    sound = inside & (gap < _CONSISTENT * length + _SLACK)
    # Less than half is a cut or noise. Counting only the pixels that happen to agree would praise exactly those clips.
    return sound if sound.mean() >= _MOSTLY else np.ones_like(sound)


def _differences(first: np.ndarray, second: np.ndarray, forward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute difference over channels, float32 [H, W], as the pictures are and after following the flow."""
    one, other = first.astype(np.float32), second.astype(np.float32)
    return np.abs(one - other).mean(axis=2), np.abs(one - _follow(other, forward)).mean(axis=2)


def _explains(difference: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """bool [H, W]: around here, following the flow takes away enough of the difference to call it motion.

    Flicker has a flow, too, but is hardly smaller after it: without this, noise of 6 / 255 on a still drawn clip reads as
    more motion than the fastest object has.
    """
    side = max(3, round(min(difference.shape) * _AROUND))
    return cv2.blur(residual, (side, side)) < _EXPLAINED * cv2.blur(difference, (side, side))


def _top_speed(vectors: np.ndarray) -> float:
    """Mean length of the longest 5 % of `vectors` [N, 2], in pixels."""
    lengths = np.hypot(vectors[:, 0], vectors[:, 1])
    count = max(1, int(lengths.size * _FASTEST))
    return float(np.partition(lengths, -count)[-count:].mean())


def _smoothness(frames: np.ndarray, greys: list[np.ndarray]) -> float:
    """1 - mean absolute error / 255 of every second frame predicted from its neighbours, as VBench does with a network.

    The middle frame's own flow is unknown; (forward - backward) / 4 is Super SloMo's estimate of it (Jiang et al.,
    1712.00080, equation 4 at t = 1/2), good where motion is locally constant.
    """
    errors = []
    for index in range(1, len(frames) - 1, 2):
        size = frames.shape[1:3]
        forward = _flow(greys[index - 1], greys[index + 1], size)
        half = (forward - _flow(greys[index + 1], greys[index - 1], size)) / 4
        before, after = (frames[index + step].astype(np.float32) for step in (-1, 1))
        predicted = (_follow(before, -half) + _follow(after, half)) / 2
        errors.append(np.abs(predicted - frames[index]).mean())
    return float(1 - np.mean(errors) / 255)


def _ways(flow: np.ndarray, short: int) -> np.ndarray:
    """float64 [3, 3, 8]: how far the pixels of each tile went in each direction, noise left out.

    A direction between two bins is shared between them: nearly the same motion must not fall into different bins.
    """
    height, width = flow.shape[:2]
    lengths = np.hypot(flow[..., 0], flow[..., 1])
    weights = np.maximum(lengths - _STILL * short, 0)
    position = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) * _WAYS
    lower = np.floor(position)
    share = position - lower
    tile = (np.arange(height) * _PLACES // height)[:, None] * _PLACES + (np.arange(width) * _PLACES // width)[None, :]
    histogram = np.zeros(_PLACES * _PLACES * _WAYS)
    for step, part in ((0, 1 - share), (1, share)):
        cell = tile * _WAYS + (lower.astype(np.int64) + step) % _WAYS
        histogram += np.bincount(cell.ravel(), weights=(weights * part).ravel(), minlength=histogram.size)
    return histogram.reshape(_PLACES, _PLACES, _WAYS)


def _normalised(vector: np.ndarray) -> np.ndarray:
    """float32 of length 1, or zeros."""
    length = np.linalg.norm(vector)
    return (vector / length if length > 0 else vector).astype(np.float32)
