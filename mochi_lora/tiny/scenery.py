"""Colours, backgrounds and the board: the tables the renderer paints with, made once."""

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from mochi_lora.tiny.world import BACKGROUNDS, COLOURS, HEIGHT, WIDTH, Background, Colour

Style = Literal["base", "chalk"]
STYLES: tuple[Style, ...] = ("base", "chalk")

# Hues at least 40 degrees apart, so that neither an autoencoder nor chalk's mixing with white can swap two of them.
PALETTE: dict[Colour, tuple[int, int, int]] = {
    "red": (222, 45, 48),
    "yellow": (248, 208, 28),
    "green": (30, 172, 66),
    "cyan": (0, 190, 204),
    "blue": (40, 84, 226),
    "purple": (158, 52, 206),
}
BOARD = (34, 62, 50)
_FOOT, _HORIZON = 50, 24  # first row below the wall, and of the sand
_PALE = 0.15  # share of white in coloured chalk
_FAINT = 0.4  # opacity of the scenery's lines
_GRAIN = 0.35  # how much opacity a stroke loses where the grain is deepest


@functools.cache
def inks(style: Style) -> torch.Tensor:
    """What objects are painted with, float32 [6, 3]: the palette, or its mixture with white."""
    palette = torch.tensor([PALETTE[name] for name in COLOURS], dtype=torch.float32)
    return palette if style == "base" else torch.lerp(palette, torch.tensor(255.0), _PALE)


def background_picture(background: Background, style: Style) -> np.ndarray:
    """A background without an object, float32 [H, W, 3] in [0, 255]."""
    index = BACKGROUNDS.index(background)
    if style == "base":
        return grounds()[index].permute(1, 2, 0).numpy()
    return torch.lerp(board(), torch.full_like(board(), 255.0), lines()[index]).permute(1, 2, 0).numpy()


@functools.cache
def grounds() -> torch.Tensor:
    """Backgrounds of the base style, float32 [4, 3, H, W]: rows of one colour each, top to bottom."""
    rows = {
        "wall": torch.cat(
            [_gradient((226, 226, 228), (206, 206, 210), _FOOT), _gradient((158, 156, 160), (146, 144, 150), HEIGHT - _FOOT)]
        ),
        "slate": _gradient((72, 78, 94), (44, 49, 62)),
        "sand": torch.cat(
            [
                _gradient((240, 234, 222), (230, 222, 206), _HORIZON),
                _gradient((216, 194, 156), (200, 175, 134), HEIGHT - _HORIZON),
            ]
        ),
        "sky": _gradient((170, 198, 226), (228, 238, 246)),
    }
    return torch.stack([rows[name].T[:, :, None].expand(3, HEIGHT, WIDTH) for name in BACKGROUNDS]).contiguous()


def _gradient(top: Sequence[int], bottom: Sequence[int], rows: int = HEIGHT) -> torch.Tensor:
    """From `top` to `bottom`, float32 [rows, 3]."""
    return torch.lerp(torch.tensor(top) * 1.0, torch.tensor(bottom) * 1.0, torch.linspace(0, 1, rows)[:, None])


@functools.cache
def board() -> torch.Tensor:
    """The board with its smears, float32 [3, H, W]."""
    smear = _smooth_noise(1, (9, 25))
    return torch.tensor(BOARD, dtype=torch.float32)[:, None, None] + 45 * smear


@functools.cache
def smears() -> torch.Tensor:
    """Uneven ground of other looks than the board's, float32 [H, W], about +-1."""
    return 3 * _smooth_noise(3, (5, 11))


@functools.cache
def grain() -> torch.Tensor:
    """How much of a chalk stroke each place of the board takes, float32 [H, W] in [0.65, 1]; it does not move."""
    return 1 - _GRAIN * (0.5 + 1.2 * _smooth_noise(2, (3, 3))).clamp(0, 1)


@functools.cache
def lines() -> torch.Tensor:
    """Opacity of each background's chalk lines, float32 [4, H, W]."""
    return torch.stack([_strokes(name) for name in BACKGROUNDS]) * _FAINT * grain()


def _smooth_noise(key: int, window: tuple[int, int]) -> torch.Tensor:
    """The same noise every time, averaged over an odd window; float32 [H, W]."""
    noise = np.random.Generator(np.random.Philox(key)).standard_normal((1, 1, HEIGHT, WIDTH), dtype=np.float32)
    padding = (window[0] // 2, window[1] // 2)
    return avg_pool2d(torch.from_numpy(noise), window, stride=1, padding=padding, count_include_pad=False)[0, 0]


def rough_grounds(rng: np.random.Generator, count: int, device: torch.device) -> torch.Tensor:
    """Texture to add to `count` plain grounds, float32 [N, 1, H, W] on `device`, in steps of a byte.

    Smoothed noise and a slope from top to bottom, each as strong as chance has it.
    """
    noise = torch.from_numpy(rng.standard_normal((count, 1, HEIGHT, WIDTH), dtype=np.float32)).to(device)
    smear = (2 * int(rng.integers(1, 6)) + 1, 2 * int(rng.integers(1, 14)) + 1)
    padding = (smear[0] // 2, smear[1] // 2)
    smooth = avg_pool2d(noise, smear, stride=1, padding=padding, count_include_pad=False) * (smear[0] * smear[1]) ** 0.5

    def strength(most: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(-most, most, (count, 1, 1, 1)).astype(np.float32)).to(device)

    slope = torch.linspace(-1, 1, HEIGHT, device=device)[:, None]
    return strength(6) * smooth + strength(40) * slope


def _strokes(background: str) -> torch.Tensor:
    """What of a background a few strokes show, opacity float32 [H, W]."""
    x, y = torch.arange(WIDTH)[None] + 0.5, torch.arange(HEIGHT)[:, None] + 0.5
    match background:
        case "wall":  # its foot
            paths = [(y - _FOOT).abs() + 0 * x]
        case "sand":  # the horizon and two dunes
            dunes = ((26, 96, 50), (84, 92, 38))
            paths = [(y - _HORIZON).abs() + 0 * x, *(_union([dune], x, y).abs() for dune in dunes)]
        case "sky":  # two clouds
            puffs = ((-8, 0, 5), (0, -3, 7), (8, 0, 5))
            paths = [_union([(cx + dx, cy + dy, r) for dx, dy, r in puffs], x, y).abs() for cx, cy in ((22, 16), (72, 24))]
        case _:  # slate splits along slanted lines
            paths = [(0.35 * x + y - offset).abs() for offset in (18, 50, 82)]
    return (1.1 - torch.stack(paths).amin(0)).clamp(0, 1)


def _union(circles: Sequence[tuple[float, float, float]], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to circles (x, y, radius) run together."""
    return torch.stack([((x - cx).square() + (y - cy).square()).sqrt() - r for cx, cy, r in circles]).amin(0)
