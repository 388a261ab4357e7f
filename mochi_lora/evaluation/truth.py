"""Ground truth, where there is one: clips of the drawn world, judged by what was asked for. No network decides here."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mochi_lora.evaluation.grid import ADAPTER, Cell
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.results import PromptSet
from mochi_lora.inference.playback import read_video
from mochi_lora.measures.drawn_world import scene_of
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.judge import accuracy, judge
from mochi_lora.tiny.style import style_score
from mochi_lora.tiny.world import Scene, place

_WORDS = ("colour", "shape", "motion")
_LABELS = {"style": "Style, 0 base to 1 chalk", "colour": "Colour right", "shape": "Shape right", "motion": "Motion right"}


def drawn_truth(cells: Sequence[Cell], folder: Path, prompt_set: PromptSet = "trigger") -> dict[str, tuple[float, float]]:
    """What -> (base, adapter at strength 1), means over the videos of `prompt_set`.

    Raises UserError for a prompt that is no sentence of the drawn world.
    """
    sides = []
    for label in (BASE, ADAPTER):
        chosen = [cell for cell in cells if cell.prompt_set == prompt_set and cell.label == label]
        marks = [
            _marks(folder / cell.shot.video, _scene(cell.content)) for cell in chosen if label == BASE or cell.strength == 1
        ]
        sides.append({name: float(np.mean([mark[name] for mark in marks])) for name in _LABELS} if marks else {})
    base, adapter = sides
    return {told: (base[name], adapter[name]) for name, told in _LABELS.items() if name in base and name in adapter}


def _scene(content: str) -> Scene:
    """A scene of these words, its place and size drawn: the style score does not depend on where the object is."""
    words = scene_of(content)
    return place(stream(0, Purpose.WORLD), words.shape, words.colour, words.background, words.motion, words.size)


def _marks(video: Path, scene: Scene) -> dict[str, float]:
    frames = read_video(video).frames
    right = accuracy(judge(frames), scene)
    return {"style": style_score(frames, scene), **{word: float(right[word]) for word in _WORDS}}
