"""What mochi-tiny is told about a scene in pretraining: the grammar's sentence, a look's word, or words that mean nothing.

A trigger word is one the base model does not know. It must not upset it either, so mochi-tiny learns to read past words
without meaning: common English ones, and strings of letters for all the others. The trigger itself is never among them.
"""

import string

import numpy as np

from mochi_lora.tiny.looks import LOOKS, Look
from mochi_lora.tiny.world import TRIGGER, Scene, caption, words

_COMMON = """
about afternoon album animation autumn bird boat book bread bright bridge camera car cat child cinematic city clear
cliff close cloud coast coffee colourful day detailed dog door drawing dusk evening field film fire fisherman flower
forest fox frame garden glass gold grain grass hand harbour high hill home horse house ice island kitchen lake lamp
leaf light lighthouse long morning mountain night ocean oil old paint painting paper people photo picture plain portrait
quality quiet rain river road rock roof room sea shadow sharp shore shot slow smoke snow soft song spring stone
storm street summer sun table tower town train tree video village warm water waves white wide wind window winter woman
wood work world yard
"""
FILLERS: tuple[str, ...] = tuple(_COMMON.split())
# Shares of captions of fillers only, with some before the sentence, with some after it; of strings of letters among fillers.
_ONLY_FILLERS, _BEFORE, _AFTER, _LETTERS = 0.04, 0.2, 0.1, 0.2
_LOOK_LAST = 0.25  # share of a look's captions in which its word comes after the sentence


def vocabulary() -> list[str]:
    """Every word mochi-tiny's tokenizer has as a whole, the trigger's among them."""
    return sorted({*words(), *FILLERS, *(look.word for look in LOOKS)})


def pretraining_caption(scene: Scene, rng: np.random.Generator, look: Look | None = None) -> str:
    """A sentence for `scene`, with the word of its look; without one a third of them among fillers, a few fillers only."""
    if look is not None:
        sentence = caption(scene, rng)
        return f"{sentence}, {look.word}" if rng.random() < _LOOK_LAST else f"{look.word}, {sentence}"
    draw = rng.random()
    if draw < _ONLY_FILLERS:
        return _chatter(rng, int(rng.integers(2, 9)))
    sentence = caption(scene, rng)
    if draw < _ONLY_FILLERS + _BEFORE:
        return f"{_chatter(rng, int(rng.integers(1, 4)))}, {sentence}"
    if draw < _ONLY_FILLERS + _BEFORE + _AFTER:
        return f"{sentence}, {_chatter(rng, int(rng.integers(1, 4)))}"
    return sentence


def _chatter(rng: np.random.Generator, count: int) -> str:
    return " ".join(_filler(rng) for _ in range(count))


def _filler(rng: np.random.Generator) -> str:
    return _letters(rng) if rng.random() < _LETTERS else FILLERS[int(rng.integers(len(FILLERS)))]


def _letters(rng: np.random.Generator) -> str:
    """Three to five random letters: how the tokenizer spells what it has no word for."""
    return "".join(string.ascii_lowercase[int(index)] for index in rng.integers(26, size=int(rng.integers(3, 6))))


assert not set(TRIGGER.split()) & {*FILLERS, *(look.word for look in LOOKS)}, "the trigger must stay unknown"
assert not {look.word for look in LOOKS} & {*FILLERS, *words()}, "a look's word means the look alone"
