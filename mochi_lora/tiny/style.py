"""How far a clip lies between the base rendering of its scene (0) and the chalk rendering (1).

Three aspects, one third each, because a style is only there when all of it is: the ground (a board instead of the
scenery), the fill (an outline instead of a solid), and the edges (strokes). Each aspect is a list of quantiles over all
pixels of the clip: a quantile does not know where the object is, so a clip may place it anywhere.
"""

import numpy as np

from mochi_lora.tiny.render import render
from mochi_lora.tiny.world import Scene

_GROUND = np.linspace(0.10, 0.75, 14)  # of each colour channel; the object has less than a quarter of the pixels
_FILL = np.linspace(0.90, 0.995, 20)  # of saturation: the object is the most saturated thing
_EDGES = np.linspace(0.85, 0.99, 15)  # of the luma's gradient
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_STRIDE = 3  # every third frame says the same as all of them


def style_score(frames: np.ndarray, scene: Scene) -> float:
    """0 as the base rendering of `scene`, 1 as the chalk rendering, not clipped; frames uint8 [F, H, W, 3].

    Of `scene`, words and sizes matter, the position does not: over other clips of the same words the mean stays 0 or 1
    within 0.02, one clip's standard deviation is 0.04.
    """
    assert frames.dtype == np.uint8, f"expected uint8, got {frames.dtype}"
    base, chalk = _aspects(render(scene, "base")), _aspects(render(scene, "chalk"))
    return float(np.mean([_between(*aspect) for aspect in zip(_aspects(frames), base, chalk, strict=True)]))


def _between(measured: np.ndarray, zero: np.ndarray, one: np.ndarray) -> float:
    """Where the projection of `measured` falls on the line from `zero` to `one`."""
    line = one - zero
    return float((measured - zero) @ line / (line @ line))


def _aspects(frames: np.ndarray) -> list[np.ndarray]:
    """Ground, fill and edges of one clip."""
    pixels = frames[::_STRIDE].astype(np.float32)
    luma = pixels @ _LUMA
    gradient = np.hypot(np.diff(luma, axis=2)[:, :-1], np.diff(luma, axis=1)[:, :, :-1])
    red, green, blue = np.moveaxis(pixels, -1, 0)
    saturation = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    ground = np.quantile(pixels.reshape(-1, 3), _GROUND, axis=0).ravel()
    return [ground, np.quantile(saturation, _FILL), np.quantile(gradient, _EDGES)]
