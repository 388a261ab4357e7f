"""Other ways to paint a scene, each called by a word: mochi-tiny learns that a word can change the look of everything.

A base model knows many styles, and an adapter's new one leans on them. One that has only ever painted in one way gives a
trigger word nothing to hold on to: a LoRA then learns the style, but for every prompt. None of these is chalk, and no
ground comes near its board.
"""

from dataclasses import dataclass

import torch

from mochi_lora.tiny.scenery import grain, grounds, inks, lines
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


LOOKS: tuple[Look, ...] = (
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


def paint_look(look: Look, background: torch.Tensor, colour: torch.Tensor, distances: torch.Tensor) -> list[torch.Tensor]:
    """Three planes float32 [N, F, H, W] in [0, 255].

    `background` and `colour` int64 [N] are indices, `distances` float32 [N, F, H, W] signed distances to the object in pixels.
    """
    device = distances.device

    def over(planes: torch.Tensor, painted: _Colour, share: torch.Tensor | float) -> torch.Tensor:
        return torch.lerp(planes, torch.tensor(painted, dtype=torch.float32, device=device).view(3, 1, 1), share)

    ground = over(grounds().to(device)[background], look.ground, look.cover)
    ground = over(ground, look.line, (lines().to(device)[background] * look.lines)[:, None])
    ink = torch.lerp(inks("base").to(device), torch.tensor(look.tint, dtype=torch.float32, device=device), look.tinted)[colour]
    # The stroke's middle lies half its width inside: outlined objects are as large as filled ones.
    shown = (look.half + 0.5 - (distances + look.half).abs()).clamp(0, 1) if look.half else (0.5 - distances).clamp(0, 1)
    shown = shown * look.opacity * torch.lerp(torch.ones((), device=device), grain().to(device), look.grainy)
    return [torch.lerp(ground[:, None, c].expand(-1, FRAMES, -1, -1), ink[:, c].view(-1, 1, 1, 1), shown) for c in range(3)]
