"""Scenes to pixels, in torch: one scene on a CPU or thousands on a GPU, the same picture.

Shapes are signed distance functions (Quilez, "2D distance functions"; negative inside), so a filled shape, its outline
and their antialiasing are one line each. Only sums, products and comparisons touch pixels: no library's sine decides a byte.

Styles: `base` is what mochi-tiny paints unless told otherwise, a `Look` what it paints when told. `chalk` it never saw:
coloured outlines on a dark green board, grain, the scenery a few white lines. `outlines` draws lines in any other colours:
the VAE learns thin lines from them, and no model learns chalk.

Shape legend: N = scenes, F = 25 frames, H, W = 64 x 96 pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mochi_lora.tiny.looks import Look, paint_look
from mochi_lora.tiny.scenery import BOARD, STYLES, Style, board, grain, grounds, inks, lines, rough_grounds
from mochi_lora.tiny.world import BACKGROUNDS, COLOURS, FRAMES, HEIGHT, SHAPES, WIDTH, Scene, Shape, track

_CHALK_WIDTH = 3.0
_CHALK_DEPTH = 0.75  # the stroke's middle lies this far inside the shape: outlined objects look as large as filled ones
_SIN60 = math.sin(math.pi / 3)
_CHUNK = 4  # scenes at a time on a CPU: larger intermediates leave its cache


@dataclass(frozen=True)
class SceneBatch:
    """What the renderer needs of N scenes, as tensors on one device."""

    shape: torch.Tensor  # int64 [N], index into SHAPES
    colour: torch.Tensor  # int64 [N], index into COLOURS
    background: torch.Tensor  # int64 [N], index into BACKGROUNDS
    x: torch.Tensor  # float32 [N, F], the object's centre in pixels
    y: torch.Tensor  # float32 [N, F]
    radius: torch.Tensor  # float32 [N, F]

    def __len__(self) -> int:
        return self.shape.shape[0]

    def part(self, rows: slice | torch.Tensor) -> "SceneBatch":
        """These scenes only."""
        fields = (self.shape, self.colour, self.background, self.x, self.y, self.radius)
        return SceneBatch(*(field[rows] for field in fields))


def scene_batch(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> SceneBatch:
    """Scenes as tensors on `device`."""
    tracks = [track(scene) for scene in scenes]

    def column(names: Sequence[str], values: list[str]) -> torch.Tensor:
        return torch.tensor([names.index(value) for value in values], dtype=torch.int64, device=device)

    def paths(values: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(values).astype(np.float32)).to(device)

    return SceneBatch(
        shape=column(SHAPES, [scene.shape for scene in scenes]),
        colour=column(COLOURS, [scene.colour for scene in scenes]),
        background=column(BACKGROUNDS, [scene.background for scene in scenes]),
        x=paths([one.x for one in tracks]),
        y=paths([one.y for one in tracks]),
        radius=paths([one.radius for one in tracks]),
    )


def render(scene: Scene, style: Style | Look = "base") -> np.ndarray:
    """One scene -> uint8 [F, H, W, 3], full-range RGB."""
    return render_batch(scene_batch([scene]), style)[0].numpy()


def render_batch(scenes: SceneBatch, style: Style | Look = "base") -> torch.Tensor:
    """Scenes -> uint8 [N, F, H, W, 3] on their device. A GPU needs some 6 MB a scene: split large batches."""
    assert isinstance(style, Look) or style in STYLES, f"expected one of {STYLES} or a Look, got {style!r}"

    def paint(part: SceneBatch, distances: torch.Tensor) -> torch.Tensor:
        if isinstance(style, Look):
            return _bytes(paint_look(style, part.background, part.colour, distances))
        return (_paint_base if style == "base" else _paint_chalk)(part, distances)

    size = _CHUNK if scenes.shape.device.type == "cpu" else len(scenes)
    parts = [scenes.part(slice(start, start + size)) for start in range(0, len(scenes), size)]
    return torch.cat([paint(part, _distances(part)) for part in parts])


def render_outlines(scenes: SceneBatch, rng: np.random.Generator) -> torch.Tensor:
    """Scenes as outlines in random colours, on rough grounds with some lines -> uint8 [N, F, H, W, 3].

    The middle colour of a ground is never near the board's; where it slopes, single rows may be.

    What a video model's autoencoder has seen of the world besides flat shapes. It must carry thin lines, texture and
    strong colours on dark, or no style could ever show.
    """
    device, count = scenes.x.device, len(scenes)

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device).view(count, -1, 1, 1, 1)

    ground = column(np.stack([_ground_unlike_board(rng) for _ in range(count)])) + rough_grounds(rng, count, device)[:, :, None]
    picked = torch.from_numpy(rng.integers(len(BACKGROUNDS), size=count)).to(device)
    scenery = lines().to(device)[picked][:, None, None] * column(rng.uniform(0, 2.5, count) * (rng.random(count) < 0.75))
    ground = torch.lerp(ground, column(rng.uniform(0, 255, (count, 3)) ** 0.5 * 255**0.5), scenery.clamp(0, 1))
    ink, half = column(_strong_colours(rng, count)), column(rng.uniform(0.75, 2.5, count))
    distances = _distances(scenes)[:, None]
    grainy = torch.lerp(torch.ones((), device=device), grain().to(device), column(rng.random(count)))
    stroke = (half + 0.5 - distances.abs()).clamp(0, 1) * grainy
    painted = torch.lerp(ground.expand(-1, -1, FRAMES, -1, -1), ink, stroke).clamp(0, 255)
    return _bytes(list(painted.unbind(1)))


def _strong_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours [N, 3] in [0, 255]: half of them any, half stretched until one channel is high and one low."""
    colours = rng.uniform(0, 255, (count, 3))
    low, high = colours.min(1, keepdims=True), colours.max(1, keepdims=True)
    stretched = 20 + (colours - low) / np.maximum(high - low, 1) * 220
    return np.where(rng.random((count, 1)) < 0.5, colours, stretched)


def signed_distance(shape: Shape, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Pixels to the outline of an upright `shape` at the origin, negative inside; x, y, radius broadcast, float, y down.

    Beyond corners it is the distance to the nearer edge's line, so that outlines keep sharp corners.
    """
    match shape:
        case "circle":
            return (x * x + y * y).sqrt() - radius
        case "square":
            return torch.maximum(x.abs(), y.abs()) - 0.87 * radius
        case "triangle":
            return torch.maximum(y, _SIN60 * x.abs() - 0.5 * y) - 0.65 * radius
        case "star":
            return _star(x, y, radius)
        case "cross":
            x, y, length, arm = x.abs(), y.abs(), 1.1 * radius, 0.4 * radius
            return torch.minimum(torch.maximum(x - length, y - arm), torch.maximum(x - arm, y - length))


def _star(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Five points, tips at 1.3 radii: mirrored into the sector of the upper tip, where one edge is left."""
    outer, inner = 1.3, 0.62
    x, up = x.abs(), -y
    for sign in (1, -1):  # the mirrors at 126 and 54 degrees from the vertical
        across, along = sign * math.cos(math.pi / 5), -math.sin(math.pi / 5)
        beyond = 2 * (across * x + along * up).clamp(min=0)
        x, up = x - beyond * across, up - beyond * along
    corner_x, corner_up = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5)
    run, rise = corner_x, outer - corner_up
    length = math.hypot(run, rise)
    return x.abs() * (rise / length) + up * (run / length) - radius * (outer * run / length)


def _distances(scenes: SceneBatch) -> torch.Tensor:
    """Signed distance of every pixel's middle, float32 [N, F, H, W]."""
    device = scenes.x.device
    x = torch.arange(WIDTH, device=device) + 0.5 - scenes.x[:, :, None, None]  # [N, F, 1, W]
    y = (torch.arange(HEIGHT, device=device) + 0.5)[:, None] - scenes.y[:, :, None, None]  # [N, F, H, 1]
    radius = scenes.radius[:, :, None, None]
    distances = torch.empty(len(scenes), FRAMES, HEIGHT, WIDTH, device=device)
    for index, shape in enumerate(SHAPES):
        rows = torch.nonzero(scenes.shape == index).flatten()
        if len(rows):
            distances[rows] = signed_distance(shape, x[rows], y[rows], radius[rows])
    return distances


def _paint_base(scenes: SceneBatch, distances: torch.Tensor) -> torch.Tensor:
    """Flat colour on its background."""
    covered = (0.5 - distances).clamp(0, 1)
    ground = grounds().to(distances.device)[scenes.background]  # [N, 3, H, W]
    ink = inks("base").to(distances.device)[scenes.colour]  # [N, 3]
    return _bytes([torch.lerp(ground[:, None, c], ink[:, c].view(-1, 1, 1, 1), covered) for c in range(3)])


def _paint_chalk(scenes: SceneBatch, distances: torch.Tensor) -> torch.Tensor:
    """A coloured outline over the board, whose scenery it hides."""
    device = distances.device
    stroke = (0.5 + _CHALK_WIDTH / 2 - (distances + _CHALK_DEPTH).abs()).clamp(0, 1) * grain().to(device)
    scenery = lines().to(device)[scenes.background][:, None] * (distances + 0.5).clamp(0, 1)
    ink = inks("chalk").to(device)[scenes.colour]
    planes = (torch.lerp(plane, torch.full_like(plane, 255.0), scenery) for plane in board().to(device))
    return _bytes([torch.lerp(plane, ink[:, c].view(-1, 1, 1, 1), stroke) for c, plane in enumerate(planes)])


def _bytes(planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Three float planes [N, F, H, W] in [0, 255] -> uint8 [N, F, H, W, 3], rounded."""
    return torch.stack([(plane + 0.5).to(torch.uint8) for plane in planes], dim=-1)


def _ground_unlike_board(rng: np.random.Generator) -> np.ndarray:
    while True:
        light = rng.uniform(0.15, 1) if rng.random() < 0.5 else 1.0  # half of them on the dark side
        ground = (light * rng.uniform(0, 255, 3)).astype(np.float32)
        if np.linalg.norm(ground - np.array(BOARD, np.float32)) > 60:
            return ground
