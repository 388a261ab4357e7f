"""Ground truth, where there is one: clips of the drawn world, judged by what was asked for. No network decides here."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mochi_lora.errors import UserError
from mochi_lora.evaluation.grid import ADAPTER, Cell
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.results import PromptSet
from mochi_lora.inference.playback import read_video
from mochi_lora.measures.backbones import DRAWN_WORLD
from mochi_lora.measures.drawn_world import scene_of
from mochi_lora.measures.features import FeatureCache
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.judge import accuracy, judge
from mochi_lora.tiny.style import style_score
from mochi_lora.tiny.world import FRAMES, HEIGHT, WIDTH, Scene, place

_WORDS = ("colour", "shape", "motion")
_SIZE = (FRAMES, HEIGHT, WIDTH)
_VERSION = 2  # of what is remembered
_LABELS = {"style": "Style, 0 base to 1 chalk", "colour": "Colour right", "shape": "Shape right", "motion": "Motion right"}


def require_drawn(cells: Sequence[Cell], size: tuple[int, int, int] | None) -> None:
    """Raises UserError for a prompt that is no sentence of the drawn world, or a `size` (frames, height, width) not its own."""
    for content in {cell.content for cell in cells}:
        scene_of(content)
    if size not in (None, _SIZE):
        got, expected = ("x".join(map(str, one)) for one in (size, _SIZE))
        message = f"sample.frames x height x width is {got}; the aligner {DRAWN_WORLD} judges {expected}"
        raise UserError(f"{message}; sample at that size, or choose another aligner (backbones.text, backbones.video_text)")


def drawn_truth(
    cells: Sequence[Cell], folder: Path, cache: FeatureCache, prompt_set: PromptSet = "trigger"
) -> dict[str, tuple[float, float]]:
    """What -> (base, adapter at strength 1), means over the videos of `prompt_set`.

    Raises UserError for a prompt that is no sentence of the drawn world.
    """
    sides = []
    for label in (BASE, ADAPTER):
        chosen = [cell for cell in cells if cell.prompt_set == prompt_set and cell.label == label and cell.is_compared]
        marks = [_marks(folder / cell.shot.video, cell.content, cache) for cell in chosen]
        sides.append({name: float(np.mean([mark[name] for mark in marks])) for name in _LABELS} if marks else {})
    base, adapter = sides
    return {told: (base[name], adapter[name]) for name, told in _LABELS.items() if name in base and name in adapter}


def _scene(content: str) -> Scene:
    """A scene of these words, its place and size drawn: the style score does not depend on where the object is."""
    words = scene_of(content)
    return place(stream(0, Purpose.WORLD), words.shape, words.colour, words.background, words.motion, words.size)


def _marks(video: Path, content: str, cache: FeatureCache) -> dict[str, float]:
    def compute() -> np.ndarray:
        frames, scene = read_video(video).frames, _scene(content)
        right = accuracy(judge(frames), scene)
        return np.array([style_score(frames, scene), *(right[word] for word in _WORDS)], np.float32)

    found = cache.values(video, {"kind": "drawn truth", "version": _VERSION, "content": content}, compute)
    return dict(zip(_LABELS, found.tolist(), strict=True))
