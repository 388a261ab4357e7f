"""The same footage twice is found, the better one stays; different footage and pieces of one shot are left alone."""

import random
from dataclasses import replace

import cv2
import numpy as np
import pytest
from scenes import scene, write

from mochi_lora.config.curation import FilterConfig, SplitConfig
from mochi_lora.curation.clip_measures import ClipMeasures
from mochi_lora.curation.duplicates import Twin, compare_clips
from mochi_lora.curation.filters import filter_clips
from mochi_lora.curation.manifest import Clip
from mochi_lora.curation.split import split_source
from mochi_lora.curation.survey import survey_source
from mochi_lora.data.probe import probe

CHANCE = random.Random(0)  # noqa: S311
PICTURES = [CHANCE.getrandbits(64) for _ in range(400)]


def clip(name: str, picture: int, *, bits: int = 0, shot: int = 0, seconds: float = 1.0, width: int = 640, sharpness=50.0):
    """A clip whose hashes are those of one of the `PICTURES`, `bits` of each turned over."""
    hashes = (f"{picture ^ ((1 << bits) - 1):016x}",) * 8
    measures = ClipMeasures(0.0, 0.5, 3.0, sharpness, 0.0, 0.02, None, width, 360, hashes)
    return Clip(name, 0.0, seconds, "", name, shot, measures)


def find_twins(clips: list[Clip], limit: float) -> list[Twin]:
    return compare_clips(clips, limit).twins


def test_the_distance_to_the_nearest_better_clip_is_told_whatever_the_limit():
    """Not to worse ones, not within a shot, and also to one that is a twin itself."""
    clips = [clip("a", PICTURES[0], seconds=3), clip("b", PICTURES[0], bits=3, seconds=2), clip("c", PICTURES[0], bits=5)]
    for limit in (None, 4.0):
        assert compare_clips(clips, limit).nearest == [None, 3.0, 2.0]
    same_shot = [clip("a", PICTURES[0]), clip("a", PICTURES[0])]
    assert compare_clips(same_shot, None).nearest == [None, None]


def test_the_limit_of_duplicates_is_shown_with_what_it_was_cut_from():
    clips = [clip(str(number), PICTURES[0], bits=number * number) for number in range(6)]
    settings = FilterConfig(duplicate_bits=4.0, min_sharpness=None)
    (seen,) = [one for one in filter_clips(clips, settings).distributions if one.setting == "duplicate_bits"]
    assert (seen.threshold, seen.clips, seen.percentiles["0"], seen.percentiles["100"]) == (4.0, 5, 1.0, 9.0)
    assert seen.refused == 2
    assert "|" in seen.picture
    off = filter_clips(clips, FilterConfig(duplicate_bits=None)).distributions[-1]
    assert (off.setting, off.threshold, off.refused, off.counts) == ("duplicate_bits", None, 0, seen.counts)


def test_a_near_copy_is_found_with_its_distance():
    clips = [clip("a", PICTURES[0]), clip("b", PICTURES[1]), clip("c", PICTURES[0], bits=5)]
    assert find_twins(clips, 6.0) == [Twin(clip=2, better=0, bits=5.0)]
    assert find_twins(clips, 4.9) == []


def test_the_longer_then_larger_then_sharper_one_stays():
    one = clip("a", PICTURES[0])
    for better in (
        clip("b", PICTURES[0], seconds=2.0, width=320, sharpness=1.0),
        clip("b", PICTURES[0], width=1280, sharpness=1.0),
        clip("b", PICTURES[0], sharpness=51.0),
    ):
        assert find_twins([one, better], 6.0) == [Twin(0, 1, 0.0)]
        assert find_twins([better, one], 6.0) == [Twin(1, 0, 0.0)]


def test_pieces_of_one_shot_are_no_duplicates():
    assert find_twins([clip("a", PICTURES[0], shot=3), clip("a", PICTURES[0], shot=3)], 6.0) == []
    assert len(find_twins([clip("a", PICTURES[0], shot=3), clip("a", PICTURES[0], shot=4)], 6.0)) == 1


def test_nobody_is_the_twin_of_one_that_goes_itself():
    """b is near a and c near b, but c is not near a: c stays."""
    clips = [clip("a", PICTURES[0]), clip("b", PICTURES[0], bits=5), clip("c", PICTURES[0], bits=10)]
    assert find_twins(clips, 6.0) == [Twin(1, 0, 5.0)]


def test_every_copy_among_many_is_found_wherever_it_stands():
    """More than one block of comparisons."""
    clips = [clip(f"{place}", picture) for place, picture in enumerate(PICTURES)]
    copies = [clip(f"copy {place}", picture, bits=3, width=320) for place, picture in enumerate(PICTURES)]
    everything = [*copies, *clips]
    CHANCE.shuffle(everything)
    twins = find_twins(everything, 6.0)
    assert len(twins) == 400
    assert {everything[twin.clip].source for twin in twins} == {one.source for one in copies}
    assert all(everything[twin.clip].source == f"copy {everything[twin.better].source}" for twin in twins)


def test_a_refused_clip_takes_no_other_with_it():
    dark = replace(
        clip("dark", PICTURES[0], width=4000), measures=replace(clip("dark", PICTURES[0], width=4000).measures, luma=0.0)
    )
    judged = filter_clips([dark, clip("light", PICTURES[0])], FilterConfig()).clips
    assert [one.refused and one.refused.split(":")[0] for one in judged] == ["too dark", None]


def test_a_smaller_worse_copy_of_drawn_footage_goes_and_names_its_twin(tmp_path):
    film, split = scene(5, 60, detail=8), SplitConfig(mode="chunk", frames=37)
    small = np.stack([cv2.resize(frame, (240, 136), interpolation=cv2.INTER_AREA) for frame in film])
    worse = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "36")
    paths = [write(tmp_path / "good.mp4", film), write(tmp_path / "copy.mkv", small, codec=worse)]
    paths.append(write(tmp_path / "other.mp4", scene(6, 60, detail=8)))
    clips = []
    for path in paths:
        clips += split_source(path, survey_source(probe(path), split, lambda frames: None), split, tmp_path)[0]
    judged = {one.file_name: one.refused for one in filter_clips(clips, FilterConfig(min_sharpness=None)).clips}
    assert judged["good.mp4"] is None
    assert judged["other.mp4"] is None
    assert judged["copy.mkv"].startswith("duplicate: ")
    assert f"bits from {tmp_path / 'good.mp4'}@" in judged["copy.mkv"]


def clips_of(path, film) -> list[Clip]:
    split = SplitConfig()
    return split_source(write(path, film), survey_source(probe(path), split, lambda frames: None), split, path.parent)[0]


@pytest.mark.parametrize(("trimmed", "speed"), [(2, 1.0), (10, 1.0), (20, 1.0), (10, 1.5), (20, 1.5), (31, 1.5)])
def test_a_take_that_begins_later_is_found_wherever_half_a_clip_is_shared(tmp_path, trimmed, speed):
    film = scene(7, 120, detail=20, speed=speed)
    whole, later = clips_of(tmp_path / "whole.mp4", film), clips_of(tmp_path / "later.mp4", film[trimmed:])
    offset, found = trimmed / 24, 0
    for one in later:
        shared = [min(one.end + offset, other.end) - max(one.start + offset, other.start) for other in whole]
        most = int(np.argmax(shared))
        if shared[most] > 0.55 * (one.end - one.start):
            found += 1
            assert len(find_twins([whole[most], one], 6.0)) == 1, (one.start, whole[most].start)
    assert found >= 2


@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_no_moment_of_another_take_is_taken_for_this_one(tmp_path, speed):
    clips = [
        one for seed in range(7, 15) for one in clips_of(tmp_path / f"{seed}.mp4", scene(seed, 120, detail=20, speed=speed))
    ]
    assert len(clips) == 24
    assert find_twins(clips, 6.0) == []


def test_clips_of_other_lengths_are_held_against_each_other_at_every_moment():
    """A second inside three; too short a part in common says nothing."""

    def moments(name, pictures, seconds):
        made = clip(name, 0, seconds=seconds)
        return replace(made, measures=replace(made.measures, hashes=tuple(f"{picture:016x}" for picture in pictures)))

    long = moments("long", PICTURES[:24], 3.0)
    assert find_twins([long, moments("inside", PICTURES[11:19], 1.0)], 6.0) == [Twin(1, 0, 0.0)]
    assert find_twins([long, moments("half", [*PICTURES[20:24], *PICTURES[30:34]], 1.0)], 6.0) == [Twin(1, 0, 0.0)]
    assert find_twins([long, moments("less", [*PICTURES[21:24], *PICTURES[30:35]], 1.0)], 6.0) == []
