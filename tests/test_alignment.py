"""Where a clip puts its own prompt, by hand-made score tables."""

import numpy as np
import pytest

from mochi_lora.measures.alignment import Place, placed


def test_the_rank_counts_the_prompts_that_score_higher():
    scores = np.array([0.9, 0.5, 0.1])
    assert [placed(scores, own) for own in range(3)] == [Place(1, 1), Place(0, 2), Place(0, 3)]


def test_a_blind_model_ranks_in_the_middle_and_is_right_by_chance():
    assert placed(np.full(10, 0.3), 3) == Place(first=0.1, rank=5.5)


def test_a_tie_is_worth_what_drawing_lots_gives():
    rng = np.random.default_rng(0)
    for own in range(6):
        scores = rng.integers(0, 3, 6).astype(float)
        lots = [placed(scores + rng.uniform(0, 0.5, 6), own) for _ in range(4000)]  # breaks ties, keeps every other order
        place = placed(scores, own)
        assert place.rank == pytest.approx(np.mean([lot.rank for lot in lots]), abs=0.1)
        assert place.first == pytest.approx(np.mean([lot.first for lot in lots]), abs=0.03)


def test_only_the_order_of_scores_counts():
    scores = np.random.default_rng(1).standard_normal(5)
    assert [placed(np.exp(3 * scores) - 7, own) for own in range(5)] == [placed(scores, own) for own in range(5)]


@pytest.mark.parametrize(
    ("scores", "own"), [(np.array([np.nan, 1.0]), 0), (np.ones(2), 2), (np.ones(2), -1), (np.ones((1, 2)), 0)]
)
def test_tables_that_mean_nothing_are_refused(scores, own):
    with pytest.raises(AssertionError):
        placed(scores, own)
