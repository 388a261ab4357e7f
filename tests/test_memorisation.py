"""Copies against new clips of the drawn world, and the arithmetic by hand."""

from functools import cache

import cv2
import numpy as np
import pytest

from mochi_lora.measures.memorisation import clip_similarity, copy_threshold, layout, leave_one_out, nearest
from mochi_lora.tiny.render import render
from mochi_lora.tiny.world import draw_scene

EYE = np.eye(8, dtype=np.float32)


def between(cosine, size=8):
    """A clip of one frame with this cosine to EYE[0]."""
    row = np.zeros((1, size), np.float32)
    row[0, :2] = cosine, np.sqrt(1 - cosine**2)
    return row


def replayed(frames, seed):
    """What a model that has learnt a clip by heart makes of it: a little moved, blurred, brighter or darker, noisy."""
    rng = np.random.default_rng(seed)
    moved = np.roll(frames, rng.integers(-1, 2, 2), (1, 2))
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.6) for frame in moved])
    return np.clip(blurred * rng.uniform(0.95, 1.05) + rng.normal(0, 2, blurred.shape), 0, 255).astype(np.uint8)


@cache
def world():
    """Layouts of 24 training clips, their replays, and new clips of combinations that training had not, in base and chalk."""
    seen = [render(draw_scene(7, index, held_out=False), "chalk") for index in range(24)]
    new = [draw_scene(7, index, held_out=True) for index in range(24)]
    return {
        "training": [layout(frames[::3]) for frames in seen],
        "replays": [layout(replayed(frames, index)[::3]) for index, frames in enumerate(seen)],
        "new": [layout(replayed(render(scene, "chalk"), 99 + index)[::3]) for index, scene in enumerate(new)],
        "base": [layout(render(scene)[::3]) for scene in new],
    }


@pytest.mark.parametrize("count", [1, 3, 8, 24])
def test_replays_are_flagged_and_new_clips_of_the_same_style_are_not(count):
    training = world()["training"][:count]
    base = [nearest(clip, training).similarity for clip in world()["base"]]
    threshold = copy_threshold(training, base)
    replays = [nearest(clip, training) for clip in world()["replays"][:count]]
    assert all(found.similarity > threshold for found in replays)
    assert [found.clip for found in replays] == list(range(count))
    assert np.mean([nearest(clip, training).similarity > threshold for clip in world()["new"]]) <= 1 / 24
    assert np.mean(np.array(base) > threshold) <= 1 / 24


def test_cuts_of_one_piece_of_footage_do_not_switch_the_flag_off():
    """Two training clips that overlap: their similarity to each other says nothing about clips that differ."""
    training = world()["training"][:6]
    overlapping = [*training, training[0].copy()]
    base = [nearest(clip, training).similarity for clip in world()["base"]]
    assert leave_one_out(overlapping)[0] == pytest.approx(1)
    assert copy_threshold(overlapping, base) < 0.95
    assert nearest(world()["replays"][0], overlapping).similarity > copy_threshold(overlapping, base)


def test_the_threshold_is_half_way_between_different_clips_and_one_clips_own_frames():
    # Even frames against odd ones: 1 throughout, as clips of one frame have by definition. Between the clips: 0.5.
    assert copy_threshold([EYE[:1], between(0.5)], [0.2]) == pytest.approx(0.75)
    assert copy_threshold([EYE[:1], between(0.5)], [0.6]) == pytest.approx(0.8)
    assert copy_threshold([EYE[:1]], [0.6]) == pytest.approx(0.8)


def test_the_threshold_is_never_below_the_base():
    shaky = np.stack([EYE[0], between(0.3)[0], EYE[0], between(0.3)[0]])  # even to odd: 0.3
    assert copy_threshold([shaky], [0.7] * 5) == pytest.approx(0.7)


def test_the_99th_percentile_of_the_base_counts_not_its_mean():
    similarities = np.linspace(0, 1, 101) * 0.5
    assert copy_threshold([EYE[:1]], list(similarities)) == pytest.approx((0.495 + 1) / 2)


def test_nothing_to_compare_with_is_refused():
    with pytest.raises(AssertionError, match="nothing shows"):
        copy_threshold([EYE[:1]], [])
    with pytest.raises(AssertionError, match="nothing shows"):
        copy_threshold([EYE[:1], EYE[:1]], [])
    with pytest.raises(AssertionError, match="no others"):
        leave_one_out([EYE[:1]])
    with pytest.raises(AssertionError, match="no training clips"):
        nearest(EYE[:1], [])


def test_similarity_takes_the_best_match_of_each_frame():
    clip = EYE[:3]
    assert clip_similarity(clip, clip[::-1]) == 1
    assert clip_similarity(clip[:1], clip) == 1  # a piece of the training clip is a replay,
    assert clip_similarity(clip, clip[:1]) == pytest.approx(1 / 3)  # a clip that only begins like it is less of one
    assert clip_similarity(clip, EYE[3:5]) == 0


def test_nearest_names_the_clip_and_the_closest_pair_of_frames():
    clip = np.stack([EYE[0], EYE[1], EYE[2]])
    training = [EYE[5:7], np.stack([EYE[7], EYE[6], between(0.8)[0], EYE[2]]), EYE[3:5]]
    found = nearest(clip, training)
    assert found.clip == 1
    assert (found.frame, found.training_frame) == (2, 3)
    assert found.similarity == pytest.approx((0.8 + 0.6 + 1) / 3)


def test_the_ratio_compares_with_the_second_to_fifth_nearest():
    training = [between(cosine) for cosine in (0.9, 0.6, 0.5, 0.4, 0.3, -0.9)]
    assert nearest(EYE[:1], training).ratio == pytest.approx(0.9 / 0.45)
    assert nearest(EYE[:1], training[:2]).ratio == pytest.approx(1.5)
    assert nearest(EYE[:1], training[:1]).ratio == 1


def test_the_ratio_stays_a_number_where_clips_are_unrelated():
    assert nearest(EYE[:1], [between(0.8), EYE[3:4], -EYE[:1]]).ratio == pytest.approx(8)
    assert nearest(EYE[:1], [EYE[3:4], EYE[4:5]]).ratio == 1
    assert nearest(EYE[:1], [-EYE[:1], -EYE[:1]]).ratio == 1
    assert nearest(np.zeros((1, 8), np.float32), [EYE[:2]]).similarity == 0


def test_leave_one_out_is_the_nearest_other():
    values = leave_one_out([EYE[:1], between(0.6), EYE[5:6]])
    assert values == pytest.approx([0.6, 0.6, 0.0])


def test_a_layout_ignores_brightness_contrast_and_resolution_but_not_places():
    frame = render(draw_scene(7, 0, held_out=False), "base")[:1]
    own = layout(frame)[0]
    assert np.linalg.norm(own) == pytest.approx(1, abs=1e-5)
    darker = (frame * 0.6 + 20).astype(np.uint8)
    larger = cv2.resize(frame[0], (848, 480), interpolation=cv2.INTER_CUBIC)[None]
    assert layout(darker)[0] @ own > 0.99
    assert layout(larger)[0] @ own > 0.99
    assert layout(np.ascontiguousarray(frame[:, :, ::-1]))[0] @ own < 0.9


def test_a_frame_of_one_colour_has_no_layout():
    plain = np.full((2, 64, 96, 3), 40, np.uint8)
    plain[1] += np.random.default_rng(0).integers(0, 2, plain[1].shape, dtype=np.uint8)  # a codec's noise
    assert not layout(plain).any()
