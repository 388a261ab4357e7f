"""VBench's consistency formula: against its loop, and by algebra."""

import numpy as np
import pytest

from mochi_lora.measures.consistency import consistency


def unit_rows(count, size, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def vbench(embeddings):
    """As defined: a running mean over frames, each cosine clipped at 0 for itself."""
    total, count = 0.0, 0
    for t in range(1, len(embeddings)):
        to_previous = max(0.0, float(embeddings[t] @ embeddings[t - 1]))
        to_first = max(0.0, float(embeddings[t] @ embeddings[0]))
        total += (to_previous + to_first) / 2
        count += 1
    return total / count


@pytest.mark.parametrize("count", [2, 3, 16])
@pytest.mark.parametrize("size", [2, 3, 64])
def test_it_is_vbenchs_formula(count, size):
    rows = unit_rows(count, size, seed=count)
    assert consistency(rows) == pytest.approx(vbench(rows), abs=1e-6)


def test_equal_frames_give_one_and_orthogonal_frames_zero():
    assert consistency(np.repeat(unit_rows(1, 32), 7, axis=0)) == pytest.approx(1, abs=1e-6)
    assert consistency(np.eye(6, dtype=np.float32)) == 0


def test_each_cosine_is_clipped_before_the_mean():
    # cos(previous) is -1, then -1; cos(first) is -1, then 1: unclipped the mean is -1/2.
    assert consistency(np.array([[1, 0], [-1, 0], [1, 0]], np.float32)) == 0.25


def test_a_slow_drift_loses_against_the_first_frame_only():
    angles = np.linspace(0, np.pi / 2, 10)
    drift = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    step = np.cos(np.pi / 18)
    assert consistency(drift) == pytest.approx((step + np.cos(angles[1:]).mean()) / 2, abs=1e-6)


def test_a_rotation_of_the_embedding_space_changes_nothing():
    rows = unit_rows(8, 16)
    turn, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((16, 16)))
    assert consistency((rows @ turn).astype(np.float32)) == pytest.approx(consistency(rows), abs=1e-6)


@pytest.mark.parametrize("rows", [2 * np.eye(3), np.full((3, 3), np.nan), np.zeros((3, 3)), np.eye(1), np.ones(3)])
def test_what_is_no_clip_of_normalised_rows_is_refused(rows):
    with pytest.raises(AssertionError):
        consistency(rows.astype(np.float32))
