"""Alignment by hand-made cosines and score tables."""

import numpy as np
import pytest

from mochi_lora.measures.alignment import frame_text, own_ranks, retrieval


def test_frame_text_is_the_mean_cosine():
    frames = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    assert frame_text(frames, np.array([1, 0], np.float32)) == pytest.approx(1.6 / 3)
    assert frame_text(frames[:1], np.array([-1, 0], np.float32)) == pytest.approx(-1)


def test_frame_text_does_not_know_the_order_of_frames():
    rows = np.random.default_rng(0).standard_normal((6, 8))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    assert frame_text(rows[1:], rows[0]) == pytest.approx(frame_text(rows[:0:-1], rows[0]))


def test_text_that_is_not_normalised_is_refused():
    with pytest.raises(AssertionError, match="not normalised"):
        frame_text(np.eye(2, dtype=np.float32), np.array([2, 0], np.float32))


def test_ranks_count_the_prompts_that_score_higher():
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    assert own_ranks(scores, [0, 1, 2]).tolist() == [1, 2, 3]
    found = retrieval(scores, [0, 1, 2])
    assert found.recall == pytest.approx(1 / 3)
    assert found.median_rank == 2


def test_several_clips_may_share_a_prompt():
    assert own_ranks(np.array([[0.2, 0.1], [0.1, 0.2]]), [0, 0]).tolist() == [1, 2]


def test_a_blind_model_ranks_in_the_middle_and_recalls_by_chance():
    blind = retrieval(np.full((4, 10), 0.3), [0, 3, 5, 9])
    assert blind.recall == pytest.approx(0.1)
    assert blind.median_rank == 5.5


def test_a_tie_is_worth_what_drawing_lots_gives():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (20, 6)).astype(float)
    own = rng.integers(0, 6, 20).tolist()
    lots = [scores + rng.uniform(0, 0.5, scores.shape) for _ in range(4000)]  # breaks ties, keeps every other order
    assert own_ranks(scores, own) == pytest.approx(np.mean([own_ranks(lot, own) for lot in lots], axis=0), abs=0.1)
    assert retrieval(scores, own).recall == pytest.approx(np.mean([retrieval(lot, own).recall for lot in lots]), abs=0.01)


def test_only_the_order_of_scores_counts():
    scores = np.random.default_rng(1).standard_normal((8, 5))
    own = [0, 1, 2, 3, 4, 0, 1, 2]
    assert retrieval(np.exp(3 * scores) - 7, own) == retrieval(scores, own)


@pytest.mark.parametrize(
    ("scores", "own"),
    [
        (np.array([[np.nan, 1.0]]), [0]),
        (np.ones((2, 2)), [0]),
        (np.ones((1, 2)), [2]),
        (np.ones((1, 2)), [-1]),
        (np.ones(2), [0]),
    ],
)
def test_tables_that_mean_nothing_are_refused(scores, own):
    with pytest.raises(AssertionError):
        retrieval(scores, own)
