"""What a clip shows, measured from its pixels alone: colour, shape, motion, background, size. No learned model judges.

The backgrounds of this world are rows of one colour, so the median of each row over all frames is the background, whatever
made the clip. An object's colour is saturated and nothing else is: how saturated the difference from the background is
says, linearly, how much of a pixel the object covers. Outlines (chalk) are filled. Shape is the template of the same area
that overlaps best, motion the path of the centre and the growth of the area.
"""

import colorsys
import functools
from dataclasses import dataclass

import numpy as np
import torch

from mochi_lora.tiny.render import signed_distance
from mochi_lora.tiny.scenery import BOARD, PALETTE, background_picture
from mochi_lora.tiny.world import BACKGROUNDS, FRAMES, HEIGHT, SHAPES, WIDTH, Background, Colour, Motion, Scene, Shape, Size

_FAINTEST = 24.0  # difference in saturation below which there is no object, in steps of a byte
_PEAK = 0.993  # share of a clip's pixels not at full cover: the least object, a small chalk triangle, covers 1 % with strokes
_FAINT = 0.25  # cover from which an object's path is followed: thin lines fade as they grow, where half tells shape and size
_SMALLEST = 20.0  # pixels of a frame: less is a speck
_VOTERS = 7  # frames asked for the shape, evenly spaced
_MOVED = 9.0  # pixels from first to last frame; the least motion of the world is 18
_GREW = 1.3  # last radius / first; the least growth is 1.6
_WOUND = 4.2  # radians around the path's own centre; a full circle is 6.3 and a straight line 3.1
_ORBIT = 4.0  # pixels; the least orbit is 8
_BIG = 12.0  # radius between the two sizes


@dataclass(frozen=True)
class Verdict:
    """What was seen. A word is None where no object could be found in enough frames to tell."""

    colour: Colour | None
    shape: Shape | None
    motion: Motion | None
    background: Background
    size: Size | None
    centres: np.ndarray  # float64 [F, 2], (x, y) in pixels; NaN in frames without an object
    areas: np.ndarray  # float64 [F], pixels inside the object's outline; 0 without an object


def judge(frames: np.ndarray) -> Verdict:
    """Measure one clip, uint8 [25, 64, 96, 3]. A clip of any content gets an answer; about 40 ms on one core."""
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3), f"expected {(FRAMES, HEIGHT, WIDTH, 3)}, got {frames.shape}"
    assert frames.dtype == np.uint8, f"expected uint8, got {frames.dtype}"
    pixels = frames.astype(np.float32)
    ground = np.median(pixels.swapaxes(1, 2).reshape(-1, HEIGHT, 3), axis=0)  # [H, 3]
    red, green, blue = np.moveaxis(pixels - ground[:, None], -1, 0)
    cover = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    peak = float(np.quantile(cover, _PEAK))
    background = _background(pixels, ground)
    cover = np.clip(cover / max(peak, _FAINTEST), 0, 1)  # without an object nothing reaches one half
    inside = _filled(_largest_blob(cover > 0.5))
    areas, centres = _path(inside)
    seen = np.flatnonzero(areas)
    if len(seen) < FRAMES // 2:
        return Verdict(None, None, None, background, None, centres, areas)
    voters = np.unique(seen[np.linspace(0, len(seen) - 1, _VOTERS).round().astype(int)])
    ink = pixels[inside & (cover > 0.8)].mean(0)
    shape = _shape(_covers(pixels[voters], ground, ink, inside[voters]), centres[voters])
    radii = np.sqrt(areas / _unit_area(shape))
    size: Size = "big" if np.median(radii[seen[:3]]) > _BIG else "small"
    motion = _motion(*_path(_filled(_largest_blob(cover > _FAINT))))
    return Verdict(_colour(ink), shape, motion, background, size, centres, areas)


def accuracy(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Which of the scene's words the verdict confirms: colour, shape, motion, background, size."""
    words = ("colour", "shape", "motion", "background", "size")
    return {word: getattr(verdict, word) == getattr(scene, word) for word in words}


# --- finding the object -------------------------------------------------------------------------------------------------


def _shifted(masks: np.ndarray) -> np.ndarray:
    """`masks` [F, H, W] grown by one pixel in the four directions."""
    grown = masks.copy()
    grown[:, 1:] |= masks[:, :-1]
    grown[:, :-1] |= masks[:, 1:]
    grown[:, :, 1:] |= masks[:, :, :-1]
    grown[:, :, :-1] |= masks[:, :, 1:]
    return grown


def _near(masks: np.ndarray) -> np.ndarray:
    """Within one pixel of `masks`, diagonals included."""
    grown = masks.copy()
    grown[:, 1:] |= masks[:, :-1]
    grown[:, :-1] |= masks[:, 1:]
    wide = grown.copy()
    wide[:, :, 1:] |= grown[:, :, :-1]
    wide[:, :, :-1] |= grown[:, :, 1:]
    return wide


def _bridging(masks: np.ndarray) -> np.ndarray:
    """Within two pixels of `masks`: strokes that end four pixels apart touch. What draws in chalk leaves such gaps."""
    return _near(_near(masks))


def _flood(seeds: np.ndarray, passable: np.ndarray) -> np.ndarray:
    """What can be reached from `seeds` through `passable`, frame by frame; all bool [F, H, W]."""
    reached = seeds & passable
    while True:
        further = _shifted(reached) & passable
        if np.array_equal(further, reached):
            return reached
        reached = further


def _largest_blob(masks: np.ndarray) -> np.ndarray:
    """Of each frame the connected part that passes through its fullest block of 8 x 8 pixels, gaps of four bridged."""
    blocks = masks.reshape(len(masks), HEIGHT // 8, 8, WIDTH // 8, 8)
    counts = blocks.sum((2, 4))
    fullest = counts == counts.max((1, 2), keepdims=True)
    seeds = (blocks & fullest[:, :, None, :, None]).reshape(masks.shape)
    return _flood(seeds, _bridging(masks)) & masks


def _filled(masks: np.ndarray) -> np.ndarray:
    """Outlines become solid, even with gaps of four pixels; notches of solid shapes stay open."""
    border = np.zeros_like(masks)
    border[:, [0, -1]] = border[:, :, [0, -1]] = True
    walls = _bridging(masks)
    bridged = ~_flood(border, ~walls) & ~walls
    return masks | ~_flood(border, ~masks) | _bridging(bridged)


def _path(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas [F] and centres [F, 2] of masks [F, H, W]; specks are nothing."""
    areas = inside.sum((1, 2)).astype(np.float64)
    areas[areas < _SMALLEST] = 0
    return areas, _centres(inside, areas)


def _centres(inside: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Centroids (x, y), float64 [F, 2], NaN where the area is 0."""
    centres = np.full((len(areas), 2), np.nan)
    seen = areas > 0
    columns, rows = np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5
    centres[seen, 0] = (inside.sum(1) @ columns)[seen] / areas[seen]
    centres[seen, 1] = (inside.sum(2) @ rows)[seen] / areas[seen]
    return centres


# --- naming what was found ----------------------------------------------------------------------------------------------


def _background(pixels: np.ndarray, ground: np.ndarray) -> Background:
    """The known background nearest to the rows' colours; on a board, the one whose chalk lines are nearest."""
    means = ground.mean(0)
    boards = [np.abs(ground - background_picture(name, "base").mean(1)).mean() for name in BACKGROUNDS]
    if np.abs(means - np.array(BOARD)).mean() > min(boards):
        return BACKGROUNDS[int(np.argmin(boards))]
    still = np.median(pixels, axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.abs(still - background_picture(name, "chalk")).mean()))


def _colour(ink: np.ndarray) -> Colour:
    """The palette's colour of the nearest hue; `ink` float32 [3] in [0, 255]."""
    hue = _hue(ink)
    return min(PALETTE, key=lambda name: abs((hue - _hue(np.array(PALETTE[name])) + 0.5) % 1 - 0.5))


def _hue(rgb: np.ndarray) -> float:
    """Hue in [0, 1)."""
    return colorsys.rgb_to_hsv(*(rgb / 255).tolist())[0]


def _covers(pixels: np.ndarray, ground: np.ndarray, ink: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers, in [0, 1]: exact along the edge of the solid masks `inside` [K, H, W].

    Saturation finds the object, but codecs and autoencoders blur it; the edge is read from all of the colour.
    """
    contrast = ink - ground[:, None]  # [H, 1, 3]
    edge = ((pixels - ground[:, None]) * contrast).sum(-1) / np.maximum((contrast**2).sum(-1), 1.0)
    core = ~_near(~inside)
    return np.where(core, 1.0, np.clip(edge, 0, 1) * _near(inside))


def _shape(covers: np.ndarray, centres: np.ndarray) -> Shape:
    """The template that overlaps best at the same area and centre, over all frames given; covers [K, H, W] in [0, 1]."""
    x = torch.from_numpy(np.arange(WIDTH) + 0.5 - centres[:, 0, None, None])
    y = torch.from_numpy((np.arange(HEIGHT) + 0.5)[:, None] - centres[:, 1, None, None])
    areas = covers.sum((1, 2))
    overlaps: dict[Shape, float] = {}
    for shape in SHAPES:
        radii = torch.from_numpy(np.sqrt(areas / _unit_area(shape))[:, None, None])
        template = (0.5 - signed_distance(shape, x, y, radii)).clamp(0, 1).numpy()
        shared, joint = np.minimum(covers, template), np.maximum(covers, template)
        overlaps[shape] = float((shared.sum((1, 2)) / joint.sum((1, 2))).mean())
    return max(overlaps, key=overlaps.__getitem__)


@functools.cache
def _unit_area(shape: Shape) -> float:
    """Area of a shape of radius 1."""
    grid = (torch.arange(1000) + 0.5) / 1000 * 3 - 1.5
    inside = signed_distance(shape, grid, grid[:, None], torch.tensor(1.0)) < 0
    return float(inside.double().mean()) * 9


def _motion(areas: np.ndarray, centres: np.ndarray) -> Motion:
    """The motion of areas [F] and centres [F, 2]."""
    times = np.flatnonzero(areas)
    centres = centres[times]
    around = centres - centres.mean(0)
    turns = np.unwrap(np.arctan2(around[:, 1], around[:, 0]))
    if abs(turns[-1] - turns[0]) > _WOUND and np.linalg.norm(around, axis=1).mean() > _ORBIT:
        return "circles"
    right, down = _change(times, centres)
    if max(abs(right), abs(down)) > _MOVED:
        if abs(right) > abs(down):
            return "right" if right > 0 else "left"
        return "down" if down > 0 else "up"
    return "grows" if np.exp(_change(times, np.log(areas[times, None]))[0] / 2) > _GREW else "still"


def _change(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How much each column of `values` [K, N] changes over a clip; frames in which an outline was torn are outvoted.

    Source: P. K. Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968: the median slope of all pairs.
    """
    first, second = np.triu_indices(len(times), k=1)
    slopes = (values[second] - values[first]) / (times[second] - times[first])[:, None]
    return np.median(slopes, axis=0) * (FRAMES - 1)
