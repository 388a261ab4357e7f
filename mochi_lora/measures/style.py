"""How close a clip is to the reference clips in style: nearest references, and Gram statistics of feature maps.

Shape legend: F frames of a clip, R reference frames, D dimensions; feature maps are [C, H, W].
"""

from collections.abc import Sequence

import numpy as np

from mochi_lora.measures.similarity import checked

_MOST_CHANNELS = 512  # a triangle of 131,328 numbers; nothing in VGG16 is wider, and twice the width is four times the memory


def reference_similarity(frames: np.ndarray, references: np.ndarray, nearest: int = 5) -> float:
    """Mean over `frames` [F, D] of the mean cosine with the `nearest` most similar `references` [R, D]; in [-1, 1].

    All references where there are fewer. Nearest, not all: a style data set shows several subjects, and a clip of one of
    them should not lose for the others.
    """
    assert nearest >= 1, f"nearest {nearest}"
    cosines = checked(frames) @ checked(references).T
    count = min(nearest, cosines.shape[1])
    return float(np.partition(cosines, -count, axis=1)[:, -count:].mean())


def gram_descriptor(feature_maps: Sequence[np.ndarray]) -> np.ndarray:
    """Style of one frame, float32 [sum over layers of C (C + 1) / 2], length 1; `feature_maps` float [C, H, W], C <= 512.

    Per layer the Gram matrix of channels (Gatys et al., 1508.06576), which does not know where anything is. Each layer is
    scaled to the same length: the cosine of two descriptors is the mean over layers of their Gram matrices' cosines, and
    neither brightness of a layer nor its width gives it more say. A layer that is 0 everywhere adds zeros.
    """
    assert feature_maps, "no layers"
    layers = [_gram_triangle(maps) for maps in feature_maps]
    descriptor = np.concatenate(layers)
    length = np.linalg.norm(descriptor)
    assert length > 0, "every feature map is 0: the network that made them is broken"
    return (descriptor / length).astype(np.float32)


def _gram_triangle(maps: np.ndarray) -> np.ndarray:
    """Upper triangle of one layer's Gram matrix, float64 [C (C + 1) / 2], length 1 (or zeros)."""
    assert maps.ndim == 3, f"expected [C, H, W], got {maps.shape}"
    assert maps.shape[0] <= _MOST_CHANNELS, f"{maps.shape[0]} channels, at most {_MOST_CHANNELS}"
    assert np.all(np.isfinite(maps)), "feature maps hold NaN or infinity"
    rows = maps.reshape(maps.shape[0], -1).astype(np.float64)
    gram = rows @ rows.T
    upper = np.triu_indices(len(gram))
    # Off the diagonal each entry stands for two: with sqrt(2) the triangle's dot product is the whole matrix's.
    triangle = gram[upper] * np.where(upper[0] == upper[1], 1.0, np.sqrt(2.0))
    length = np.linalg.norm(triangle)
    return triangle / length if length > 0 else triangle
