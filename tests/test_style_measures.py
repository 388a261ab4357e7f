"""Nearest references, and Gram descriptors as an inner product of matrices."""

import numpy as np
import pytest

from mochi_lora.measures.style import gram_descriptor, reference_similarity

RNG = np.random.default_rng(0)


def maps(channels, seed, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((channels, 5, 7)) + shift).astype(np.float32)


def gram_cosine(a, b):
    """Of two full Gram matrices, as Gatys et al. write them."""
    one, other = (x.reshape(len(x), -1) @ x.reshape(len(x), -1).T for x in (a.astype(float), b.astype(float)))
    return (one * other).sum() / np.sqrt(np.square(one).sum() * np.square(other).sum())


def test_only_the_nearest_references_count():
    frame = np.array([[1, 0]], np.float32)
    references = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32)
    assert reference_similarity(frame, references, nearest=1) == pytest.approx(1)
    assert reference_similarity(frame, references, nearest=2) == pytest.approx(0.9)
    assert reference_similarity(frame, references, nearest=4) == pytest.approx(0.2)


def test_fewer_references_than_asked_for_are_all_used():
    frames = np.array([[1, 0], [0, 1]], np.float32)
    assert reference_similarity(frames, frames) == pytest.approx(0.5)


def test_a_reference_of_another_subject_takes_nothing_away():
    rows = RNG.standard_normal((30, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    near = reference_similarity(rows[:4], rows[:20])
    assert reference_similarity(rows[:4], rows) >= near


def test_the_descriptor_is_normalised_and_as_long_as_the_triangles():
    descriptor = gram_descriptor([maps(3, 0), maps(8, 1)])
    assert descriptor.shape == (3 * 4 // 2 + 8 * 9 // 2,)
    assert descriptor.dtype == np.float32
    assert np.linalg.norm(descriptor) == pytest.approx(1, abs=1e-6)


def test_the_cosine_of_descriptors_is_the_mean_over_layers_of_the_gram_matrices_cosines():
    one, other = [maps(3, 0), maps(8, 1, shift=1)], [maps(3, 2), maps(8, 3)]
    expected = np.mean([gram_cosine(a, b) for a, b in zip(one, other, strict=True)])
    assert gram_descriptor(one) @ gram_descriptor(other) == pytest.approx(expected, abs=1e-6)


def test_a_descriptor_knows_neither_places_nor_the_number_of_pixels():
    layer = maps(4, 0)
    order = RNG.permutation(35)
    shuffled = layer.reshape(4, -1)[:, order].reshape(4, 5, 7)
    tiled = np.concatenate([layer, layer], axis=2)
    assert gram_descriptor([shuffled]) == pytest.approx(gram_descriptor([layer]), abs=1e-6)
    assert gram_descriptor([tiled]) == pytest.approx(gram_descriptor([layer]), abs=1e-6)


def test_a_loud_layer_has_no_more_say():
    one, other = maps(4, 0), maps(6, 1)
    assert gram_descriptor([100 * one, other]) == pytest.approx(gram_descriptor([one, other]), abs=1e-6)


def test_which_channels_fire_together_is_style():
    """The same channels, each as strong as before, only no longer together: a different style."""
    stripes = np.tile([1.0, 0.0], 12).reshape(1, 4, 6)
    together = np.concatenate([stripes, stripes])
    apart = np.concatenate([stripes, 1 - stripes])
    assert gram_descriptor([together]) @ gram_descriptor([apart]) < 0.8


def test_a_silent_layer_adds_nothing_and_silence_everywhere_is_refused():
    descriptor = gram_descriptor([np.zeros((2, 3, 3)), maps(3, 0)])
    assert not descriptor[:3].any()
    assert np.linalg.norm(descriptor) == pytest.approx(1, abs=1e-6)
    with pytest.raises(AssertionError, match="broken"):
        gram_descriptor([np.zeros((2, 3, 3))])


def test_layers_too_wide_for_memory_are_refused():
    assert gram_descriptor([np.ones((512, 2, 2), np.float32)]).size == 131_328
    with pytest.raises(AssertionError, match="channels"):
        gram_descriptor([np.ones((513, 2, 2), np.float32)])
