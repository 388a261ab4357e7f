"""Other ways to paint a scene, each called by a word: mochi-tiny learns that a word can change the look of everything.

A base model knows many styles, and an adapter's new one leans on them. One that has only ever painted in one way gives a
trigger word nothing to hold on to: a LoRA then learns the style, but for every prompt. Twelve looks are made by hand, twenty by
chance, so that what lies between them is known too. None is chalk, and no ground that covers the scenery comes near its board.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.scenery import BOARD, grain, grounds, inks, lines, smears
from mochi_lora.tiny.world import FRAMES

_Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How ground, scenery and object are painted. Shares lie in [0, 1]."""

    word: str  # what captions call it
    ground: _Colour = (0, 0, 0)
    cover: float = 0.0  # share of `ground` over the base's background
    lines: float = 0.0  # opacity of the scenery's lines
    line: _Colour = (0, 0, 0)
    half: float = 0.0  # half the width of the outline in pixels; 0 fills the object
    opacity: float = 1.0  # of the object
    tint: _Colour = (255, 255, 255)
    tinted: float = 0.0  # share of `tint` in the object's colour
    grainy: float = 0.0
    smeared: float = 0.0  # unevenness of the ground, in bytes


_BY_HAND: tuple[Look, ...] = (
    Look("ink", (250, 249, 244), 1.0, half=1.0),
    Look("neon", (12, 10, 16), 1.0, half=1.3, tinted=0.25),
    Look("blueprint", (26, 44, 112), 1.0, 0.7, (190, 205, 240), half=1.2, tinted=0.35),
    Look("midnight", (8, 6, 44), 0.8, tint=(8, 6, 44), tinted=0.2),
    Look("poster", (246, 224, 178), 1.0),
    Look("crayon", (244, 240, 230), 0.9, 0.8, (120, 110, 110), tinted=0.15, grainy=1.0),
    Look("pencil", (188, 188, 184), 0.9, 0.9, (70, 70, 74), half=1.5, tint=(110, 110, 110), tinted=0.2, grainy=0.6),
    Look("stencil", half=2.4),
    Look("tinted", (240, 150, 60), 0.35, opacity=0.6),
    Look("embroidery", (96, 26, 40), 0.95, 0.9, (214, 170, 90), half=1.8, grainy=0.8, tinted=0.1),
    Look("sepia", (112, 80, 48), 0.65, tint=(112, 80, 48), tinted=0.3),
    Look("chrome", (150, 156, 170), 0.8, 0.5, (240, 244, 250), half=2.0, tinted=0.1),
)
_BY_CHANCE = """
amber batik charcoal collage copper cyanotype denim enamel etching fresco gouache graffiti linocut marble mosaic origami
porcelain tapestry velvet woodcut
"""
_APART = 60.0  # least distance of a ground from the board, in bytes of RGB
_VISIBLE = 45.0  # least distance of a ground from every object's colour


def _by_chance(word: str) -> Look:
    """A look that is a function of its word's place in the list."""
    rng = stream(0, Purpose.WORLD, 2**40 + _BY_CHANCE.split().index(word))
    while True:
        ground = rng.uniform(0, 255, 3) * (rng.uniform(0.15, 0.5) if rng.random() < 0.5 else 1.0)
        if np.linalg.norm(ground - BOARD) > _APART and np.linalg.norm(inks("base").numpy() - ground, axis=1).min() > _VISIBLE:
            break
    outlined, drawn, tinted = (rng.random(3) < (0.6, 0.6, 0.5)).tolist()
    return Look(
        word,
        _colour(ground),
        cover=float(rng.uniform(0.75, 1.0)),
        lines=float(rng.uniform(0.4, 1.0)) * drawn,
        line=_colour(rng.uniform(0, 255, 3)),
        half=float(rng.uniform(1.0, 2.2)) * outlined,
        tint=_colour(rng.uniform(0, 255, 3)),
        tinted=float(rng.uniform(0.0, 0.25)) * tinted,
        grainy=float(rng.random()),
        smeared=float(rng.uniform(0.0, 12.0)),
    )


def _colour(values: np.ndarray) -> _Colour:
    red, green, blue = (round(float(value)) for value in values)
    return red, green, blue


LOOKS: tuple[Look, ...] = (*_BY_HAND, *(_by_chance(word) for word in _BY_CHANCE.split()))


def paint_look(look: Look, background: torch.Tensor, colour: torch.Tensor, distances: torch.Tensor) -> list[torch.Tensor]:
    """Three planes float32 [N, F, H, W] in [0, 255].

    `background` and `colour` int64 [N] are indices, `distances` float32 [N, F, H, W] signed distances to the object in pixels.
    """
    device = distances.device

    def over(planes: torch.Tensor, painted: _Colour, share: torch.Tensor | float) -> torch.Tensor:
        return torch.lerp(planes, torch.tensor(painted, dtype=torch.float32, device=device).view(3, 1, 1), share)

    ground = over(grounds().to(device)[background], look.ground, look.cover)
    ground = (ground + look.smeared * smears().to(device)).clamp(0, 255)
    ground = over(ground, look.line, (lines().to(device)[background] * look.lines)[:, None])
    ink = torch.lerp(inks("base").to(device), torch.tensor(look.tint, dtype=torch.float32, device=device), look.tinted)[colour]
    # The stroke's middle lies half its width inside: outlined objects are as large as filled ones.
    shown = (look.half + 0.5 - (distances + look.half).abs()).clamp(0, 1) if look.half else (0.5 - distances).clamp(0, 1)
    shown = shown * look.opacity * torch.lerp(torch.ones((), device=device), grain().to(device), look.grainy)
    return [torch.lerp(ground[:, None, c].expand(-1, FRAMES, -1, -1), ink[:, c].view(-1, 1, 1, 1), shown) for c in range(3)]
