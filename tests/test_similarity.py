"""Content kept and diversity: counter-examples to measures that look alike."""

import numpy as np
import pytest

from mochi_lora.measures.similarity import checked, content_kept, diversity


def test_an_unchanged_clip_keeps_everything():
    rows = np.array([[1, 0], [0.6, 0.8]], np.float32)
    assert content_kept(rows, rows) == pytest.approx(1)
    assert content_kept(rows, -rows) == pytest.approx(-1)


def test_the_same_frames_in_another_order_are_other_content():
    rows = np.eye(4, dtype=np.float32)
    assert content_kept(rows, rows[::-1]) == 0


def test_clips_of_different_lengths_are_not_compared():
    with pytest.raises(AssertionError, match="differ in shape"):
        content_kept(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[:3])


def test_one_clip_has_no_diversity():
    assert diversity([np.eye(2, dtype=np.float32)]) is None
    assert diversity([]) is None


def test_collapsed_seeds_have_diversity_zero():
    clip = np.eye(3, dtype=np.float32)
    assert diversity([clip, clip, clip]) == pytest.approx(0)


def test_diversity_is_the_mean_over_pairs():
    one, other = np.array([[1, 0]], np.float32), np.array([[0, 1]], np.float32)
    assert diversity([one, other]) == pytest.approx(1)
    assert diversity([one, one, other]) == pytest.approx(2 / 3)  # pairs: 0, 1, 1
    assert diversity([other, one, one]) == diversity([one, one, other])


def test_rows_of_zeros_pass_only_where_nothing_may_be_described():
    rows = np.array([[0, 0], [1, 0]], np.float32)
    assert checked(rows, blank=True).tolist() == rows.tolist()
    with pytest.raises(AssertionError, match="not normalised"):
        checked(rows)
    with pytest.raises(AssertionError, match="not normalised"):
        checked(rows * np.nan, blank=True)


def test_half_precision_passes():
    rows = np.random.default_rng(0).standard_normal((20, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert checked(rows.astype(np.float16)).dtype == np.float64
