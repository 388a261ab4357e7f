"""Drawn clips with captions on disk: what a style or a motion LoRA of mochi-tiny is trained on."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mochi_lora.data.whole_folder import write_whole
from mochi_lora.files import write_text
from mochi_lora.inference.video import write_mp4
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.render import render
from mochi_lora.tiny.scenery import Style
from mochi_lora.tiny.world import MOVING, Motion, caption, chalk_caption, draw_scene

MARKER = "drawn.json"
_VERSION = 1  # of the pictures: a folder drawn by another version is not taken for this one


@dataclass(frozen=True)
class DrawnSet:
    """Which clips: `count` scenes of `seed` from the training side of the split, doing one of `motions`."""

    style: Style
    count: int
    motions: tuple[Motion, ...] = MOVING
    seed: int = 0


def _ignore_clip(_done: int) -> None:
    """Nobody watches."""


def draw_set(folder: Path, wanted: DrawnSet, *, on_clip: Callable[[int], None] = _ignore_clip) -> Path:
    """See that `folder` holds these clips and nothing else, whole or not at all; `on_clip(done)` follows each.

    A folder already drawn from the same words is kept. Any other non-empty folder raises UserError.
    """
    told = asdict(wanted)
    content = {"version": _VERSION, **told, "motions": list(wanted.motions)}
    words = " ".join(f"{name} {value}" for name, value in told.items() if name != "motions")
    what = f"the drawn set of {words}, motions {' '.join(wanted.motions)}"

    def fill(draft: Path) -> None:
        draw_clips(draft, wanted, on_clip=on_clip)

    return write_whole(folder, marker=MARKER, content=content, what=what, fill=fill)


def draw_clips(folder: Path, wanted: DrawnSet, *, on_clip: Callable[[int], None] = _ignore_clip) -> list[Path]:
    """Write `NNN.mp4` and `NNN.txt` for every scene and return the videos; in chalk, captions begin with the trigger.

    Every file is written whole or not at all, and again if it is there: the same set gives the same frames.
    """
    paths = []
    for index in range(wanted.count):
        scene = draw_scene(wanted.seed, index, motions=wanted.motions, held_out=False)
        words = (chalk_caption if wanted.style == "chalk" else caption)(scene, stream(wanted.seed, Purpose.WORLD, index, 1))
        path = folder / f"{index:03d}.mp4"
        write_mp4(path, render(scene, wanted.style))
        write_text(path.with_suffix(".txt"), words + "\n")
        paths.append(path)
        on_clip(index + 1)
    return paths
