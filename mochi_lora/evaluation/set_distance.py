"""How far base and adapter, each as a whole, are from the references: two sets of embedded frames against a third."""

from collections.abc import Mapping, Sequence

import numpy as np

from mochi_lora.evaluation.grid import ADAPTER, Cell
from mochi_lora.evaluation.paired import BASE, Design
from mochi_lora.evaluation.results import Missing, SetDistance
from mochi_lora.measures.distribution import median_distance, mmd2, permutation_p

MEASURE = "style.distance"
_FEWEST_CLIPS = 4  # on a side: with fewer, hardly any way to deal them out is left


def set_distance(
    cells: Sequence[Cell], embedded: Mapping[str, np.ndarray], references: Sequence[np.ndarray], design: Design
) -> SetDistance | Missing:
    """Unbiased MMD^2 of the trigger prompts' clips to the reference clips, with permutation tests over whole clips.

    `embedded` has float32 [f, D] per video, `references` one per reference clip. One bandwidth for both sides, so that their
    values can be compared. A quick design tests nothing.
    """
    sides = {label: [embedded[video] for video in _videos(cells, label)] for label in (BASE, ADAPTER)}
    fewest = min(len(references), *map(len, sides.values()))
    if fewest < _FEWEST_CLIPS:
        return Missing(
            MEASURE, f"{fewest} clips on one side are too few for a distance between sets; {_FEWEST_CLIPS} are needed"
        )
    theirs, their_clips = _flat(references)
    bandwidth = median_distance(np.concatenate([theirs, *(_flat(side)[0] for side in sides.values())]))
    distances: dict[str, float] = {}
    chances: dict[str, float | None] = {}
    for label, side in sides.items():
        rows, clips = _flat(side)
        distances[label] = mmd2(rows, theirs, bandwidth, groups_x=clips, groups_y=their_clips)
        chances[label] = None if design.quick else permutation_p(rows, theirs, clips, their_clips, design.seed)
    return SetDistance(MEASURE, distances[BASE], distances[ADAPTER], chances[BASE], chances[ADAPTER])


def _videos(cells: Sequence[Cell], label: str) -> list[str]:
    return [cell.shot.video for cell in cells if cell.prompt_set == "trigger" and cell.label == label and cell.is_compared]


def _flat(clips: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Frames of all clips [N, D], and the number of each frame's clip [N]."""
    return np.concatenate(clips), np.repeat(np.arange(len(clips)), [len(clip) for clip in clips])
