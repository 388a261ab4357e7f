"""How near a clip is to the chalk rendering of its scene (1), where the base rendering of the scene is 0.

Three aspects, one third each, because a style is only there when all of it is: the ground (a board instead of the
scenery), the fill (an outline instead of a solid), and the edges (strokes). Each aspect is a list of quantiles over all
pixels of the clip: a quantile does not know where the object is, so a clip may place it anywhere.

An aspect's score is what is gone of the distance from base to chalk. Its place on the line between them alone would not do:
dark grounds and outlines of another colour lie far along that line and far beside it, and neon would score as chalk does.
"""

from functools import lru_cache

import cv2
import numpy as np

from mochi_lora.tiny.render import render
from mochi_lora.tiny.world import Scene

_GROUND = np.linspace(0.10, 0.75, 14)  # of each colour channel; the object has less than a quarter of the pixels
_FILL = np.linspace(0.90, 0.995, 20)  # of saturation: the object is the most saturated thing
_EDGES = np.linspace(0.85, 0.99, 15)  # of the luma's gradient
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_SOFT = (3, 3)  # weights 1 2 1 both ways: the grain of single pixels is more than mochi-tiny's VAE can hold
_STRIDE = 3  # every third frame says the same as all of them


def style_score(frames: np.ndarray, scene: Scene) -> float:
    """0 as the base rendering of `scene`, 1 as the chalk rendering, below 0 farther from it; frames uint8 [F, H, W, 3].

    Of `scene`, words and sizes matter, the position does not: over other clips of the same words the means are 0.00 for base
    and 0.96 for chalk, one clip's standard deviation is 0.04. Chalk that went through mochi-tiny's VAE scores 0.82 on average,
    the nearest of the looks it was trained on, woodcut, 0.57.
    """
    assert frames.dtype == np.uint8, f"expected uint8, got {frames.dtype}"
    return float(np.mean([_nearness(*aspect) for aspect in zip(_aspects(frames), *_ends(scene), strict=True)]))


@lru_cache(maxsize=256)  # a scene is scored for base and adapter, at several strengths
def _ends(scene: Scene) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of its base rendering, and of its chalk rendering."""
    return _aspects(render(scene, "base")), _aspects(render(scene, "chalk"))


def _nearness(measured: np.ndarray, zero: np.ndarray, one: np.ndarray) -> float:
    """What is gone of the distance from `zero` to `one`."""
    return float(1 - np.linalg.norm(measured - one) / np.linalg.norm(zero - one))


def _aspects(frames: np.ndarray) -> list[np.ndarray]:
    """Ground, fill and edges of one clip."""
    pixels = np.stack([cv2.GaussianBlur(frame.astype(np.float32), _SOFT, 0) for frame in frames[::_STRIDE]])
    luma = pixels @ _LUMA
    gradient = np.hypot(np.diff(luma, axis=2)[:, :-1], np.diff(luma, axis=1)[:, :, :-1])
    red, green, blue = np.moveaxis(pixels, -1, 0)
    saturation = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    ground = np.quantile(pixels.reshape(-1, 3), _GROUND, axis=0).ravel()
    return [ground, np.quantile(saturation, _FILL), np.quantile(gradient, _EDGES)]
