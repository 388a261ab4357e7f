"""Copies against new clips of the drawn world, and the arithmetic by hand."""

from functools import cache

import cv2
import numpy as np
import pytest

from mochi_lora.evaluation.copies import copy_looks, memorisation
from mochi_lora.evaluation.footage import Clip, Footage
from mochi_lora.evaluation.grid import ADAPTER, Cell
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.results import Missing
from mochi_lora.inference.shots import Shot
from mochi_lora.inference.video import write_mp4
from mochi_lora.measures.features import FeatureCache
from mochi_lora.measures.memorisation import (
    Gallery,
    between,
    clip_similarity,
    copy_threshold,
    even_to_odd,
    layout,
    nearest,
    ratio_to_next,
    thumbnails,
)
from mochi_lora.tiny.render import render
from mochi_lora.tiny.world import draw_scene

EYE = np.eye(8, dtype=np.float32)
ALONE = np.full((1, 1), -np.inf)


def pair(similarity):
    """What `between` says of two training clips this much alike."""
    return np.array([[-np.inf, similarity], [similarity, -np.inf]])


def replayed(frames, seed):
    """What a model that has learnt a clip by heart makes of it: a little moved, blurred, brighter or darker, noisy."""
    rng = np.random.default_rng(seed)
    moved = np.roll(frames, rng.integers(-1, 2, 2), (1, 2))
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.6) for frame in moved])
    return np.clip(blurred * rng.uniform(0.95, 1.05) + rng.normal(0, 2, blurred.shape), 0, 255).astype(np.uint8)


def cropped(frames, left, top, size):
    """That part of the picture, enlarged to all of it."""
    height, width = frames.shape[1:3]
    inside = frames[:, round(top * height) : round((top + size) * height), round(left * width) : round((left + size) * width)]
    return np.stack([cv2.resize(frame, (width, height)) for frame in inside])


@cache
def world():
    """Thumbnails of 24 training clips, their replays, crops, and new clips of combinations that training had not."""
    seen = [render(draw_scene(7, index, held_out=False), "chalk")[::3] for index in range(24)]
    new = [draw_scene(7, index, held_out=True) for index in range(24)]
    again = [replayed(frames, index) for index, frames in enumerate(seen)]
    return {
        "training": [thumbnails(frames) for frames in seen],
        "replays": [thumbnails(frames) for frames in again],
        "crops": [thumbnails(cropped(frames, 0.03 * (index % 4), 0.02, 0.88)) for index, frames in enumerate(again)],
        "new": [thumbnails(replayed(render(scene, "chalk")[::3], 99 + index)) for index, scene in enumerate(new)],
        "base": [thumbnails(render(scene)[::3]) for scene in new],
    }


def judged(training, base):
    """The gallery, and the threshold for it."""
    gallery = Gallery.of(training)
    among = np.stack([between(gallery, own) for own in range(len(training))])
    found = [nearest(clip, gallery).similarity for clip in base]
    return gallery, copy_threshold(among, [even_to_odd(clip) for clip in training], found)


@pytest.mark.parametrize("count", [1, 3, 8, 16])
def test_replays_and_slightly_cropped_ones_are_flagged_and_new_clips_of_the_same_style_are_not(count):
    base = world()["base"][:12]
    gallery, threshold = judged(world()["training"][:count], base)
    for copies in (world()["replays"][:count], world()["crops"][:count]):
        found = [nearest(clip, gallery) for clip in copies]
        assert all(one.similarity > threshold for one in found)
        assert [one.clip for one in found] == list(range(count))
    assert np.mean([nearest(clip, gallery).similarity > threshold for clip in world()["new"]]) <= 1 / 24
    assert max(nearest(clip, gallery).similarity for clip in base) <= threshold


def test_cuts_of_one_piece_of_footage_do_not_switch_the_flag_off():
    """Two training clips that overlap: their similarity to each other says nothing about clips that differ."""
    training = world()["training"][:6]
    gallery, threshold = judged([*training, training[0].copy()], world()["base"][:6])
    assert between(gallery, 0)[6] == pytest.approx(1)
    assert threshold < 0.95
    assert nearest(world()["replays"][0], gallery).similarity > threshold


def test_the_threshold_is_half_way_between_different_clips_and_one_clips_own_frames():
    assert copy_threshold(pair(0.5), [1, 1], [0.2]) == pytest.approx(0.75)
    assert copy_threshold(pair(0.5), [1, 1], [0.6]) == pytest.approx(0.8)
    assert copy_threshold(ALONE, [1], [0.6]) == pytest.approx(0.8)


def test_the_threshold_is_never_below_the_base():
    assert copy_threshold(ALONE, [0.3], [0.7] * 5) == pytest.approx(0.7)


def test_the_99th_percentile_of_the_base_counts_not_its_mean():
    similarities = np.linspace(0, 1, 101) * 0.5
    assert copy_threshold(ALONE, [1], list(similarities)) == pytest.approx((0.495 + 1) / 2)


def test_without_anything_that_differs_there_is_no_threshold():
    assert copy_threshold(ALONE, [1], []) is None
    assert copy_threshold(pair(1.0), [1, 1], []) is None
    with pytest.raises(AssertionError, match="no training clips"):
        Gallery.of([])


def test_similarity_takes_the_best_match_of_each_frame():
    clip = EYE[:3]
    assert clip_similarity(clip, clip[::-1]) == 1
    assert clip_similarity(clip[:1], clip) == 1  # a piece of the training clip is a replay,
    assert clip_similarity(clip, clip[:1]) == pytest.approx(1 / 3)  # a clip that only begins like it is less of one
    assert clip_similarity(clip, EYE[3:5]) == 0


def test_nearest_names_the_clip_and_the_closest_pair_of_frames():
    training = world()["training"]
    clip = np.stack([training[3][0], training[5][4], training[3][1]])
    found = nearest(clip, Gallery.of([training[0], training[3][:2], training[7][:1]]))
    assert found.clip == 1
    assert (found.frame, found.training_frame) in {(0, 0), (2, 1)}
    assert 2 / 3 < found.similarity < 1


def test_a_part_is_looked_for_down_to_four_fifths_of_a_side():
    still = render(draw_scene(7, 0, held_out=False), "chalk")[:4]
    gallery = Gallery.of([thumbnails(still)])
    whole, near, far = (
        nearest(thumbnails(cropped(still, *part)), gallery) for part in ((0, 0, 1), (0.15, 0.05, 0.8), (0, 0, 0.5))
    )
    assert whole.similarity == pytest.approx(1)
    assert near.similarity > 0.95
    assert far.similarity < 0.9


def test_a_clip_of_another_shape_is_compared_by_the_middle_that_a_model_learnt_of_it():
    tall = cv2.resize(render(draw_scene(7, 2, held_out=False), "chalk")[0], (128, 128))[None]
    middle = np.ascontiguousarray(tall[:, 21:107])
    assert np.allclose(thumbnails(tall, 128 / 86), thumbnails(middle))
    assert (layout(thumbnails(tall)) @ layout(thumbnails(middle)).T).item() < 0.95


def test_the_ratio_compares_with_the_second_to_fifth_nearest():
    similarities = np.array([0.9, 0.6, 0.5, 0.4, 0.3, -0.9])
    assert ratio_to_next(similarities) == pytest.approx(0.9 / 0.45)
    assert ratio_to_next(similarities[:2]) == pytest.approx(1.5)
    assert ratio_to_next(similarities[:1]) == 1


def test_the_ratio_stays_a_number_where_clips_are_unrelated():
    assert ratio_to_next(np.array([0.8, 0.0, -1.0])) == pytest.approx(8)
    assert ratio_to_next(np.array([0.0, 0.0])) == 1
    assert ratio_to_next(np.array([-1.0, -1.0])) == 1


def test_a_layout_ignores_brightness_contrast_and_resolution_but_not_places():
    frame = render(draw_scene(7, 0, held_out=False), "base")[:1]

    def seen(frames):
        return layout(thumbnails(frames))[0]

    own = seen(frame)
    assert np.linalg.norm(own) == pytest.approx(1, abs=1e-5)
    assert seen((frame * 0.6 + 20).astype(np.uint8)) @ own > 0.99
    assert seen(cv2.resize(frame[0], (848, 480), interpolation=cv2.INTER_CUBIC)[None]) @ own > 0.99
    assert seen(np.ascontiguousarray(frame[:, :, ::-1])) @ own < 0.9


def test_a_frame_of_one_colour_has_no_layout():
    plain = np.full((2, 64, 96, 3), 40, np.uint8)
    plain[1] += np.random.default_rng(0).integers(0, 2, plain[1].shape, dtype=np.uint8)  # a codec's noise
    assert not layout(thumbnails(plain)).any()
    assert nearest(thumbnails(plain), Gallery.of(world()["training"][:2])).similarity == 0


@pytest.fixture
def replays(tmp_path):
    """A room where the adapter plays training clip 0 on two captions, the base something else: (cells, room, training)."""

    def film(index, *, style="chalk", held_out=False):
        return render(draw_scene(7, index, held_out=held_out), style)

    for name in ("one", "two"):
        write_mp4(tmp_path / name / "000.mp4", film(("one", "two").index(name)))
    cells = []
    for number in range(2):
        write_mp4(tmp_path / f"base/{number}.mp4", film(number, style="base", held_out=True))
        write_mp4(tmp_path / f"adapter/{number}.mp4", replayed(film(number), number))
        for side in (BASE, ADAPTER):
            shot = Shot(f"{side}/{number}.mp4", f"chalk style, {number}", 0)
            cells.append(Cell("training", side, float(side == ADAPTER), f"{number}", shot))
    return cells, tmp_path, [Clip.open(tmp_path / name / "000.mp4") for name in ("one", "two")]


def test_it_is_said_which_videos_were_compared_with_how_many_clips_and_which_is_nearest(replays):
    cells, room, training = replays
    steps = []
    footage = Footage(FeatureCache(room / "features"), 4, lambda: steps.append(1))
    found = memorisation(cells, room, training, footage, told="2 of 9, evenly spaced")
    assert (found.conclusion, found.flagged_share, found.base_flagged_share) == ("memorises", 1, 0)
    assert sorted(row.training_clip for row in found.nearest) == ["one/000.mp4", "two/000.mp4"]
    assert found.prompt_set == "training"
    assert "2 videos of the adapter on captions of training clips" in found.scope
    assert "against the training clips (2 of 9, evenly spaced)" in found.scope
    assert len(steps) == copy_looks(cells, len(training))


def test_one_piece_of_footage_without_a_base_is_a_gap(replays):
    cells, room, training = replays
    alone = [cell for cell in cells if cell.label == ADAPTER]
    found = memorisation(alone, room, [training[0], training[0]], Footage(FeatureCache(room / "features"), 4))
    assert isinstance(found, Missing)
    assert "one piece of footage" in found.because
