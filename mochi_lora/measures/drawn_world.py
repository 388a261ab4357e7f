"""Alignment by ground truth, for mochi-tiny: which of a prompt's words the drawn world's judge sees in the clip.

Colour, shape, motion and size count. The background does not: a chalk clip is on a board, a half-styled one between board
and scenery, and there the judge's word for the background says how much style there is, not whether the prompt was obeyed.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mochi_lora.errors import UserError
from mochi_lora.tiny.judge import judge
from mochi_lora.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    HEIGHT,
    MOTIONS,
    SHAPES,
    SIZES,
    TRIGGER,
    WIDTH,
    Scene,
    captions,
)

_WORDS = ("colour", "shape", "motion", "size")


@functools.cache
def _sentences() -> dict[str, Scene]:
    """Every sentence of the grammar and its words: 1680 scenes, 10 sentences each; 30 ms."""
    scenes = itertools.product(SHAPES, COLOURS, BACKGROUNDS, MOTIONS, SIZES)
    return {sentence: scene for words in scenes for scene in [Scene(*words, 0, 0, 0)] for sentence in captions(scene)}


def scene_of(prompt: str) -> Scene:
    """The words of a caption, with or without the trigger. UserError for a sentence the grammar does not make."""
    sentence = prompt.strip().removeprefix(f"{TRIGGER}, ")
    found = _sentences().get(sentence)
    if found is None:
        example = next(iter(_sentences()))
        message = f'"{prompt}": not a sentence of the drawn world, which the aligner drawn-world is made for'
        raise UserError(f'{message}; write prompts such as "{example}", or choose another aligner')
    return found


@dataclass(frozen=True)
class DrawnWorldAligner:
    """Share of a prompt's words that are seen."""

    name: str = "drawn-world@1"
    comparable: bool = False

    def scores(self, frames: np.ndarray, fps: float, prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002 - fixed length
        """float32 [P], each 0, 1/4, ... 1; the clip is uint8 [25, 64, 96, 3]."""
        if frames.shape != (FRAMES, HEIGHT, WIDTH, 3):
            got, expected = "x".join(map(str, frames.shape[:3])), f"{FRAMES}x{HEIGHT}x{WIDTH}"
            raise UserError(f"drawn-world judges clips of {expected} (frames x height x width), got {got}; sample at that size")
        seen = judge(frames)
        wanted = [scene_of(prompt) for prompt in prompts]
        shares = [np.mean([getattr(seen, word) == getattr(scene, word) for word in _WORDS]) for scene in wanted]
        return np.array(shares, np.float32)

    def truncated(self, prompts: Sequence[str]) -> int:  # noqa: ARG002 - of the protocol
        """None is too long."""
        return 0
