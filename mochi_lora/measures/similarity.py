"""Cosines between embedded frames: what embeddings have to be, content kept, diversity.

Shape legend: F, G frames; D dimensions; embeddings are float32 [F, D] with rows of length 1.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

_TOLERANCE = 1e-3  # of a row's length: what half precision leaves


def checked(embeddings: np.ndarray, *, blank: bool = False) -> np.ndarray:
    """`embeddings` [F, D] as float64, F >= 1, after asserting rows of length 1 (with `blank`, also rows of zeros).

    Rows that were not normalised (or hold NaN) would pass through every cosine below as plausible numbers. A row of zeros
    says that there was nothing to describe; its cosine with everything is 0.
    """
    assert embeddings.ndim == 2, f"expected [F, D], got {embeddings.shape}"
    assert len(embeddings) > 0, "no frames"
    rows = embeddings.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    allowed = np.abs(lengths - 1) < _TOLERANCE
    if blank:
        allowed |= lengths == 0
    assert np.all(allowed), f"rows are not normalised: lengths {lengths.min():.4f}..{lengths.max():.4f}"
    return rows


def content_kept(base: np.ndarray, adapter: np.ndarray) -> float:
    """Mean cosine of frame f of `base` with frame f of `adapter`, [F, D] each, in [-1, 1]; 1 is unchanged.

    Frame by frame, not best match: the same prompt and seed start from the same noise, so the same moment shows the same.
    """
    assert base.shape == adapter.shape, f"clips of one prompt and seed differ in shape: {base.shape}, {adapter.shape}"
    return float(np.sum(checked(base) * checked(adapter), axis=1).mean())


def diversity(clips: Sequence[np.ndarray]) -> float | None:
    """Mean of 1 - `content_kept` over all pairs of `clips` ([F, D] each, one prompt, different seeds), in [0, 2].

    None where there are fewer than two clips: one seed says nothing about the spread of seeds.
    """
    if len(clips) < 2:
        return None
    return float(np.mean([1 - content_kept(one, other) for one, other in combinations(clips, 2)]))
