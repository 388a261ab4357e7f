"""MMD: its definition, that it is unbiased also with frames that come in clips, and that the test keeps its level."""

import numpy as np
import pytest

from mochi_lora.measures.distribution import median_distance, mmd2, permutation_p


def definition(x, y, bandwidth):
    """Gretton et al. 2012, equation 3, term by term."""

    def k(a, b):
        return np.exp(-np.square(a - b).sum() / (2 * bandwidth**2))

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def clips(rng, count, frames=6, size=8, shift=0.0, spread=0.2):
    """`count` clips around their own centres: embeddings [count x frames, size] of length 1 and each row's clip."""
    centres = rng.standard_normal((count, size))
    centres[:, 0] += shift
    rows = np.repeat(centres, frames, axis=0) + spread * rng.standard_normal((count * frames, size))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), np.repeat(np.arange(count), frames)


def test_it_is_the_unbiased_estimator():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 1
    assert mmd2(x, y, 1.5) == pytest.approx(definition(x, y, 1.5), abs=1e-12)
    assert mmd2(y, x, 1.5) == pytest.approx(mmd2(x, y, 1.5), abs=1e-12)


def test_rows_of_a_clip_are_compared_with_other_clips_only():
    rng = np.random.default_rng(1)
    x, groups_x = clips(rng, 3, frames=2)
    y, groups_y = clips(rng, 2, frames=4)

    def mean(a, ga, b, gb, *, same):
        return np.mean(
            [
                np.exp(-np.square(p - q).sum() / 2)
                for p, i in zip(a, ga, strict=True)
                for q, j in zip(b, gb, strict=True)
                if not same or i != j
            ]
        )

    expected = mean(x, groups_x, x, groups_x, same=True) + mean(y, groups_y, y, groups_y, same=True)
    expected -= 2 * mean(x, groups_x, y, groups_y, same=False)
    assert mmd2(x, y, 1.0, groups_x=groups_x, groups_y=groups_y) == pytest.approx(expected, abs=1e-12)


def test_order_of_rows_and_names_of_clips_do_not_matter():
    rng = np.random.default_rng(2)
    (x, groups_x), (y, groups_y) = clips(rng, 4), clips(rng, 5)
    order = rng.permutation(len(x))
    shuffled = mmd2(x[order], y, groups_x=(90 - 10 * groups_x)[order], groups_y=groups_y)
    assert shuffled == pytest.approx(mmd2(x, y, groups_x=groups_x, groups_y=groups_y), abs=1e-12)


def test_large_sets_in_blocks_give_the_same():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((700, 4)), rng.standard_normal((30, 4))
    assert mmd2(x, y, 2.0) == pytest.approx(by_matrix(x, y, 2.0), abs=1e-12)


def by_matrix(x, y, bandwidth):
    def kernel(a, b):
        return np.exp(-np.square(a[:, None] - b[None]).sum(axis=2) / (2 * bandwidth**2))

    n, m = len(x), len(y)
    return (kernel(x, x).sum() - n) / (n * (n - 1)) + (kernel(y, y).sum() - m) / (m * (m - 1)) - 2 * kernel(x, y).mean()


def test_equal_distributions_are_zero_on_average_though_frames_come_in_clips():
    rng = np.random.default_rng(4)
    draws = [(clips(rng, 6), clips(rng, 8)) for _ in range(300)]
    whole = [mmd2(x, y, 0.7, groups_x=gx, groups_y=gy) for (x, gx), (y, gy) in draws]
    frames = [mmd2(x, y, 0.7) for (x, _), (y, _) in draws]
    error = np.std(whole) / np.sqrt(len(whole))
    assert abs(np.mean(whole)) < 4 * error
    assert np.mean(frames) > 20 * error  # what ignoring the clips would report for equal distributions


def test_it_grows_with_the_distance():
    rng = np.random.default_rng(5)
    x = clips(rng, 40)[0]
    values = [mmd2(x, clips(np.random.default_rng(6), 40, shift=shift)[0], 0.7) for shift in (0, 1, 2, 4)]
    assert values == sorted(values)
    assert values[-1] > 0.1


def test_the_median_bandwidth_follows_the_scale_of_the_embeddings():
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((20, 4)) + 1
    assert mmd2(1000 * x, 1000 * y) == pytest.approx(mmd2(x, y), abs=1e-9)
    assert mmd2(x, y) > 0.05
    assert mmd2(x / 30, y / 30, 10.0) < 1e-3  # CMMD's 10 on short vectors: blind


def test_the_median_distance_is_that_of_all_pairs_also_of_float32_rows_far_from_zero():
    rows = (np.random.default_rng(8).standard_normal((40, 6)) * 0.01 + 5).astype(np.float32)
    pairs = [np.linalg.norm(a.astype(np.float64) - b) for index, a in enumerate(rows) for b in rows[:index].astype(np.float64)]
    assert median_distance(rows) == pytest.approx(np.median(pairs), rel=1e-9)


def test_frozen_clips_do_not_make_the_bandwidth_zero():
    rows = np.repeat(np.eye(4), 50, axis=0)
    value = mmd2(rows[:100], rows[100:], groups_x=np.arange(100) // 50, groups_y=np.arange(100) // 50)
    assert np.isfinite(value)
    assert mmd2(np.ones((4, 2)), np.ones((4, 2))) == 0


def test_the_test_keeps_its_level_though_frames_come_in_clips():
    """Uniform p under "equal": with frames permuted instead of clips nearly all of these would be below 0.05."""
    rng = np.random.default_rng(8)
    whole, single = [], []
    for index in range(200):
        (x, groups_x), (y, groups_y) = clips(rng, 6), clips(rng, 7)
        whole.append(permutation_p(x, y, groups_x, groups_y, index, 99))
        if index < 40:
            single.append(permutation_p(x, y, np.arange(len(x)), np.arange(len(y)), index, 99))
    assert 0.01 <= np.mean(np.array(whole) <= 0.05) <= 0.10
    assert 0.40 <= np.mean(np.array(whole) <= 0.50) <= 0.60
    assert np.mean(np.array(single) <= 0.05) > 0.5


def test_the_test_finds_a_difference():
    rng = np.random.default_rng(9)
    for index in range(10):
        (x, groups_x), (y, groups_y) = clips(rng, 10), clips(rng, 10, shift=4)
        assert permutation_p(x, y, groups_x, groups_y, index, 199) == 1 / 200


def test_p_is_a_function_of_the_seed_and_never_zero():
    rng = np.random.default_rng(10)
    (x, groups_x), (y, groups_y) = clips(rng, 5), clips(rng, 5)
    first = permutation_p(x, y, groups_x, groups_y, 0, 50)
    assert first == permutation_p(x, y, groups_x, groups_y, 0, 50)
    assert len({permutation_p(x, y, groups_x, groups_y, seed, 50) for seed in range(8)}) > 1
    assert 1 / 51 <= first <= 1


def test_few_clips_cannot_be_significant():
    """3 against 3: 20 deals, of which the observed one and its mirror image are the most extreme possible."""
    (x, groups_x), (y, groups_y) = (clips(np.random.default_rng(seed), 3, shift=shift) for seed, shift in ((0, 0), (1, 30)))
    assert permutation_p(x, y, groups_x, groups_y, 0, 4000) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("x", "y", "groups"),
    [
        (np.ones((3, 2)), np.ones((3, 2)), np.zeros(3)),  # one clip a side
        (np.ones((1, 2)), np.ones((3, 2)), None),
        (np.ones((3, 2)), np.ones((3, 4)), None),
        (np.full((3, 2), np.nan), np.ones((3, 2)), None),
    ],
)
def test_sets_without_pairs_of_clips_and_broken_ones_are_refused(x, y, groups):
    with pytest.raises(AssertionError):
        mmd2(x, y, groups_x=groups, groups_y=groups)
