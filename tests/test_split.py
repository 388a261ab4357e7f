"""The split: by video, whatever the clips are called and in however many files a video lies."""

import pytest

from mochi_lora.data.split import validation_sources, video_of

DIGESTS = [f"{number * 2654435761 % 2**32:08x}" for number in range(40)]


@pytest.mark.parametrize(
    ("sources", "fraction", "expected"), [(40, 0.1, 4), (40, 0, 0), (8, 0.15, 1), (3, 0.01, 1), (2, 0.99, 1)]
)
def test_the_fraction_held_out_is_rounded_and_one_at_least(sources, fraction, expected):
    assert len(validation_sources(DIGESTS[:sources], fraction)) == expected


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_training_is_never_left_without_a_source(count, fraction):
    assert len(validation_sources(DIGESTS[:count], fraction)) < count


def test_a_single_source_is_never_held_out_however_many_ranges_it_gives():
    assert validation_sources(["a"] * 10, 0.5) == set()


def test_order_and_repetition_do_not_move_the_split():
    split = validation_sources(DIGESTS, 0.2)
    assert validation_sources(DIGESTS[::-1] + DIGESTS[:7], 0.2) == split
    assert split <= set(DIGESTS)


def test_one_more_clip_moves_at_most_one_source_across():
    before = validation_sources(DIGESTS[:30], 0.2)
    after = validation_sources(DIGESTS[:31], 0.2)
    assert len(before - after) <= 1
    assert len(after - before) <= 1


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
