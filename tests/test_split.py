"""The split: by video, whatever the clips are called and in however many files a video lies."""

import numpy as np
import pytest

from mochi_lora.data.split import validation_sources, video_of

DIGESTS = [f"{number * 2654435761 % 2**32:08x}" for number in range(40)]


def clips_of(sizes):
    """The video of each clip: `sizes[i]` clips of video i."""
    return [digest for digest, size in zip(DIGESTS, sizes, strict=False) for _ in range(size)]


def held_of(sizes, fraction):
    """Clips held out of each video that is."""
    held = validation_sources(clips_of(sizes), fraction)
    return [size for digest, size in zip(DIGESTS, sizes, strict=False) if digest in held]


@pytest.mark.parametrize(
    ("sources", "fraction", "expected"), [(40, 0.1, 4), (40, 0, 0), (8, 0.15, 1), (3, 0.01, 1), (2, 0.99, 1)]
)
def test_of_videos_with_one_clip_each_the_fraction_is_rounded_and_one_at_least(sources, fraction, expected):
    held = validation_sources(DIGESTS[:sources], fraction)
    assert held == set(sorted(DIGESTS[:sources])[:expected])


@pytest.mark.parametrize("sizes", [(30, 1), (1, 30)])
def test_a_video_that_holds_most_clips_is_never_held_out(sizes):
    assert held_of(sizes, 0.1) == [1]
    assert held_of(sizes, 0.5) == [1]


def test_it_is_the_clips_held_out_that_come_near_the_fraction():
    generator = np.random.default_rng(5)
    for _ in range(200):
        sizes = generator.choice((1, 2, 3, 8, 20), generator.integers(20, 40)).tolist()
        target = 0.1 * sum(sizes)
        assert abs(sum(held_of(sizes, 0.1)) - target) <= max(1, 0.25 * target), sizes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((10,) * 7, [10]), ((19, *(2,) * 39), [2] * 5), ((30, 29), [29]), ((10, 10, 10), [10]), ((7, 7, 7, 79), [7])],
)
def test_where_no_videos_make_the_fraction_the_nearest_is_taken_and_one_at_least(sizes, expected):
    assert held_of(sizes, 0.1) == expected


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5])
def test_no_more_than_half_is_held_out_where_no_more_is_asked_for(fraction):
    generator = np.random.default_rng(6)
    for _ in range(300):
        sizes = generator.choice((1, 3, 9, 40), generator.integers(2, 7)).tolist()
        held = sum(held_of(sizes, fraction))
        assert 0 < held <= max(sum(sizes) / 2, round(fraction * sum(sizes))), sizes


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_training_is_never_left_without_a_source(count, fraction):
    assert len(validation_sources(DIGESTS[:count], fraction)) < count


def test_a_single_source_is_never_held_out_however_many_ranges_it_gives():
    assert validation_sources(["a"] * 10, 0.5) == set()


def test_the_order_of_the_clips_does_not_move_the_split():
    clips = clips_of([3, 1, 8, 2, 5] * 8)
    split = validation_sources(clips, 0.2)
    assert validation_sources(clips[::-1], 0.2) == split
    assert split <= set(DIGESTS)


def test_one_more_clip_moves_at_most_one_source_across():
    before = validation_sources(DIGESTS[:30], 0.2)
    after = validation_sources(DIGESTS[:31], 0.2)
    assert len(before - after) <= 1
    assert len(after - before) <= 1


def test_one_more_video_leaves_most_of_those_held_out_where_they_are():
    generator = np.random.default_rng(7)
    kept = []
    for _ in range(100):
        sizes = generator.choice((1, 2, 3, 8), 31).tolist()
        before, after = (validation_sources(clips_of(sizes[:count]), 0.2) for count in (30, 31))
        kept.append(len(before & after) / len(before))
    assert sum(kept) / len(kept) > 0.8


A, B, C, D = (letter * 64 for letter in "abcd")


def test_files_without_a_known_video_stand_for_themselves():
    assert video_of([(A, None), (B, None), (A, None)]) == {A: A, B: B}


def test_files_cut_from_one_video_belong_together_in_whatever_order_they_come():
    clips = [(C, "film.mp4"), (B, "other.mp4"), (A, "film.mp4"), (D, None)]
    for order in (clips, clips[::-1]):
        assert video_of(order) == {A: A, C: A, B: B, D: D}


def test_a_clip_belongs_to_the_video_whose_content_it_names():
    """An exported clip names its source by SHA-256; the source itself may stand in another table."""
    assert video_of([(B, A), (A, None), (C, None)]) == {A: A, B: A, C: C}


def test_what_is_joined_by_a_chain_is_one_video():
    assert video_of([(A, "x.mp4"), (B, "x.mp4"), (B, "y.mp4"), (C, "y.mp4")]) == dict.fromkeys((A, B, C), A)


def test_a_video_that_is_only_named_is_not_counted_as_a_source():
    videos = video_of([(B, A), (C, A), (D, None)])
    assert set(videos.values()) == {B, D}
