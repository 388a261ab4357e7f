import numpy as np
import pytest

from mochi_lora.errors import UserError
from mochi_lora.measures.backbones import load_aligner
from mochi_lora.measures.drawn_world import scene_of
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.render import render
from mochi_lora.tiny.world import MOTIONS, TRIGGER, caption, captions, chalk_caption, draw_scene

WORDS = ("shape", "colour", "background", "motion", "size")


def scenes(count):
    return [draw_scene(7, index, motions=MOTIONS, held_out=False) for index in range(count)]


@pytest.mark.parametrize("write", [caption, chalk_caption])
def test_every_caption_is_read_back(write):
    rng = stream(0, Purpose.WORLD, 0)
    for scene in scenes(200):
        read = scene_of(write(scene, rng))
        assert [getattr(read, word) for word in WORDS] == [getattr(scene, word) for word in WORDS]


@pytest.mark.parametrize("style", ["base", "chalk"])
def test_a_clip_scores_one_on_its_own_prompt_and_a_quarter_less_per_wrong_word(style):
    aligner = load_aligner("drawn-world", "cpu")
    own, wrong = [], []
    for scene in scenes(12):
        right = next(iter(captions(scene)))
        other = right.replace(scene.colour, "red" if scene.colour != "red" else "blue")
        scores = aligner.scores(render(scene, style), 30.0, [right, other, f"{TRIGGER}, {right}"])
        assert scores.dtype == np.float32
        assert scores[0] == scores[2]
        own.append(scores[0])
        wrong.append(scores[0] - scores[1])
    assert np.mean(own) >= 0.95
    assert np.mean(wrong) == pytest.approx(0.25, abs=0.03)


def test_a_wrong_background_costs_nothing():
    scene = next(scene for scene in scenes(50) if scene.background == "sand")
    right = next(iter(captions(scene)))
    other = right.replace("on beige sand", "on dark slate")
    assert other != right
    scores = load_aligner("drawn-world", "cpu").scores(render(scene, "base"), 30.0, [right, other])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("prompt", ["a cat", "", "a small red circle", f"{TRIGGER}, a dog runs"])
def test_a_prompt_the_grammar_does_not_make_is_refused_by_name(prompt):
    with pytest.raises(UserError, match="not a sentence of the drawn world"):
        load_aligner("drawn-world", "cpu").scores(np.zeros((25, 64, 96, 3), np.uint8), 30.0, [prompt])


def test_a_clip_of_another_size_is_refused_with_the_right_one():
    with pytest.raises(UserError, match=r"25x64x96.*got 19x64x96"):
        load_aligner("drawn-world", "cpu").scores(np.zeros((19, 64, 96, 3), np.uint8), 30.0, [])
