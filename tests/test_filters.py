"""What is refused and why, the crop of bars, and the distribution each limit was cut from."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from scenes import SIZE, black, scene, title, write

from mochi_lora.config.curation import FilterConfig, SplitConfig
from mochi_lora.curation.clip_measures import ClipMeasures
from mochi_lora.curation.filters import count_reasons, filter_clips
from mochi_lora.curation.manifest import Clip
from mochi_lora.curation.split import split_source
from mochi_lora.curation.survey import survey_source
from mochi_lora.data.probe import probe

GOOD = ClipMeasures(0.0, 0.5, 3.0, 400.0, 0.0, 0.02, None, 1280, 720, ("0" * 16,) * 8)
SPLIT = SplitConfig(mode="middle", frames=37)


def clip(number: int = 0, **measures) -> Clip:
    unlike = tuple(f"{(0xF0F << number * 7) & (2**64 - 1):016x}" for _ in range(8))
    return Clip("a.mp4", float(number), number + 1.0, "", "a.mp4", number, replace(GOOD, hashes=unlike, **measures))


def refusal(settings: FilterConfig | None = None, **measures) -> str | None:
    (judged,) = filter_clips([clip(**measures)], settings or FilterConfig()).clips
    return judged.refused


@pytest.mark.parametrize(
    ("measures", "reason"),
    [
        ({"black": 0.2}, "black: 0.2 is above filter.max_black 0"),
        ({"luma": 0.05}, "too dark: 0.05 is below filter.min_luma 0.1"),
        ({"motion": 0.01}, "near-static: 0.01 is below filter.min_motion 0.1"),
        ({"sharpness": 3.0}, "blurred: 3 is below filter.min_sharpness 20"),
        ({"flicker": 0.04}, "flicker: 0.04 is above filter.max_flicker 0.01"),
    ],
)
def test_a_refusal_names_value_limit_and_setting(measures, reason):
    assert refusal(**measures) == reason
    off = {reason.split("filter.")[1].split()[0]: None}
    assert refusal(FilterConfig(**off), **measures) is None


def test_most_motion_is_only_a_limit_when_set():
    assert refusal(motion=50.0) is None
    assert refusal(FilterConfig(max_motion=20), motion=50.0) == "too much motion: 50 is above filter.max_motion 20"


def test_a_value_on_the_limit_passes_and_one_not_measured_too():
    assert refusal(luma=0.1, motion=0.1, sharpness=20.0, flicker=0.01) is None
    assert refusal(motion=None, sharpness=None) is None


def test_the_crop_of_bars_is_used_or_only_told():
    bars = (0, 90, 1280, 630)
    (cropped,) = filter_clips([clip(bars=bars)], FilterConfig()).clips
    (whole,) = filter_clips([clip(bars=bars)], FilterConfig(crop_bars=False)).clips
    assert (cropped.crop, cropped.flags, cropped.refused) == (bars, ("letterbox",), None)
    assert (whole.crop, whole.flags) == (None, ("letterbox",))


def test_each_limit_shows_what_it_was_cut_from():
    clips = [clip(number, luma=number / 10) for number in range(11)]
    (seen,) = [one for one in filter_clips(clips, FilterConfig(min_luma=0.35)).distributions if one.setting == "min_luma"]
    assert (seen.refused, seen.clips, seen.threshold) == (4, 11, 0.35)
    assert (seen.percentiles["0"], seen.percentiles["50"], seen.percentiles["100"]) == (0.0, 0.5, 1.0)
    assert sum(seen.counts) == 11
    left, right = seen.picture.split("|")
    assert len(left) + len(right) == 20
    assert len(left.replace(" ", "")) == 4, "a bar for each of the four darker ones before the mark"


def test_a_limit_outside_all_values_is_marked_at_the_side():
    clips = [clip(number, motion=1.0 + number) for number in range(3)]
    by_name = {one.setting: one for one in filter_clips(clips, FilterConfig(max_motion=100)).distributions}
    assert by_name["min_motion"].picture.startswith("|")
    assert by_name["max_motion"].picture.endswith("|")
    assert "|" not in {one.setting: one for one in filter_clips(clips, FilterConfig()).distributions}["max_motion"].picture


def test_reasons_are_counted():
    judged = filter_clips([clip(0), clip(1, luma=0.0), clip(2, luma=0.01), clip(3, motion=0.0)], FilterConfig()).clips
    assert count_reasons(judged) == [("too dark", 2), ("near-static", 1)]


# --- on drawn footage -------------------------------------------------------------------------------------------------------


def measured(tmp_path, film: np.ndarray) -> Clip:
    path = write(tmp_path / "film.mp4", film)
    (found,), _ = split_source(path, survey_source(probe(path), SPLIT, lambda frames: None), SPLIT, tmp_path)
    (judged,) = filter_clips([found], FilterConfig()).clips
    return judged


def framed(film: np.ndarray, *, top: int = 0, side: int = 0) -> np.ndarray:
    film = film.copy()
    film[:, :top], film[:, film.shape[1] - top :] = 0, 0
    film[:, :, :side], film[:, :, film.shape[2] - side :] = 0, 0
    return film


def test_a_drawn_scene_passes_whole(tmp_path):
    judged = measured(tmp_path, scene(1, 60, detail=5))
    assert (judged.refused, judged.crop, judged.flags) == (None, None, ())


@pytest.mark.parametrize(
    ("reason", "film"),
    [
        ("black", lambda: black(60)),
        ("too dark", lambda: title(60)),
        ("too dark", lambda: scene(1, 60, detail=5) // 6),
        ("near-static", lambda: scene(1, 60, speed=0, detail=5)),
        ("blurred", lambda: np.stack([cv2.GaussianBlur(frame, (0, 0), 6) for frame in scene(1, 60)])),
        (
            "flicker",
            lambda: (scene(1, 60, detail=5) * np.where(np.arange(60) % 2, 0.9, 1.0)[:, None, None, None]).astype(np.uint8),
        ),
    ],
)
def test_bad_footage_is_refused_for_what_is_bad(tmp_path, reason, film):
    refused = measured(tmp_path, film()).refused
    assert refused is not None
    assert refused.split(":")[0] == reason


@pytest.mark.parametrize(("top", "side"), [(24, 0), (0, 40), (12, 20)])
def test_bars_are_cropped_to_the_picture(tmp_path, top, side):
    crop = measured(tmp_path, framed(scene(1, 60, detail=5), top=top, side=side)).crop
    width, height = SIZE
    expected = (side, top, width - side, height - top)
    assert crop is not None
    for found, edge, inwards in zip(crop, expected, (1, 1, -1, -1), strict=True):
        assert 0 <= (found - edge) * inwards <= 4, (crop, expected)
        assert found % 2 == 0


def test_a_dark_moment_makes_no_bars_where_the_rest_of_the_shot_has_none(tmp_path):
    film = scene(1, 110, detail=5)
    film[:60] = np.stack([framed(frame[None], top=20 - index // 3)[0] for index, frame in enumerate(film[:60])])
    path = write(tmp_path / "film.mp4", film)
    survey = survey_source(probe(path), SPLIT, lambda frames: None)
    assert survey.bars(0, 20) is not None
    clips, _ = split_source(path, survey, SplitConfig(mode="chunk", frames=19), tmp_path)
    assert len(clips) >= 3
    assert {one.measures.bars for one in clips} == {None}


def test_a_lit_thing_in_black_space_has_no_bars(tmp_path):
    film = black(60)
    for index, frame in enumerate(film):
        cv2.circle(frame, (150 + index // 6, 90), 50, (200, 180, 90), -1)
    assert measured(tmp_path, film).crop is None
