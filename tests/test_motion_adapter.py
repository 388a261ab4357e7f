"""The motion recipe's adapter (`python tests/make_adapters.py motion`): what mochi-tiny never saw go round goes round."""

import pytest
from drawn_prompts import drawn
from make_adapters import FOLDER

from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.exam import exam_scenes, exam_sentences, marks
from mochi_lora.tiny.world import HELD_OUT_MOTION, Scene, caption, draw_scene

pytestmark = pytest.mark.slow
ADAPTER = FOLDER / "motion.safetensors"
CLIPS = 32


def circling() -> tuple[list[Scene], list[str]]:
    """Held-out scenes that go round, and a sentence for each."""
    scenes = [draw_scene(1, index, motions=(HELD_OUT_MOTION,), held_out=True) for index in range(CLIPS)]
    return scenes, [caption(scene, stream(1, Purpose.WORLD, index, 1)) for index, scene in enumerate(scenes)]


def test_the_held_out_motion_appears_in_two_thirds_of_clips():
    scenes, sentences = circling()
    found = marks(drawn(sentences, ADAPTER), scenes)
    assert found["motion"] >= 2 / 3, found
    assert min(found["colour"], found["shape"]) >= 0.8, found


def test_the_base_alone_cannot_do_it():
    scenes, sentences = circling()
    assert marks(drawn(sentences[:8]), scenes[:8])["motion"] <= 1 / 8


def test_other_motions_stay_as_they_were():
    scenes = exam_scenes(CLIPS // 2)
    found = marks(drawn(exam_sentences(scenes), ADAPTER), scenes)
    assert found["motion"] >= 0.9, "the base's is 1.00"
