"""Do two sets of embedded frames come from the same distribution: unbiased MMD, and a test that permutes whole clips.

Frames of one clip resemble each other far more than frames of two clips of the same distribution. Comparing a clip with
itself therefore makes two equal distributions look different, and permuting frames makes chance look significant. Both
functions know which clip a frame is from.

Shape legend: N, M frames; D dimensions; G clips in all.
"""

import numpy as np

from mochi_lora.streams import Purpose, stream

_POSITION = 2  # of the stream: evaluation/statistics.py draws from 0 and 1
_ROWS = 512  # of the kernel matrix at a time
_SAMPLE = 2000  # frames that the median distance is taken over; the exact median is not worth N^2 numbers


def mmd2(
    x: np.ndarray,
    y: np.ndarray,
    bandwidth: float | None = None,
    *,
    groups_x: np.ndarray | None = None,
    groups_y: np.ndarray | None = None,
) -> float:
    """Unbiased squared maximum mean discrepancy of `x` float [N, D] and `y` float [M, D]; about 0, also below, when equal.

    Gretton et al. 2012, equation 3, with the Gaussian kernel exp(-d^2 / 2 bandwidth^2) as in CMMD (Jayasumana et al.,
    2401.09603). CMMD's bandwidth of 10 is for CLIP embeddings as they come; rows of length 1 are at most 2 apart, where 10
    sees nothing. None takes the median distance between the rows of both sets: values of different pairs of sets then
    have different scales.

    `groups_x` int [N] and `groups_y` int [M] name each row's clip: pairs within a clip are left out. Without, every row is
    its own clip. Each side needs two clips.
    """
    sums, sizes, mine = _clip_sums(x, y, _groups(x, groups_x), _groups(y, groups_y), bandwidth)
    return float(_statistic(sums, sizes, mine[None])[0])


def permutation_p(
    x: np.ndarray, y: np.ndarray, groups_x: np.ndarray, groups_y: np.ndarray, seed: int, permutations: int = 1000
) -> float:
    """P-value of "x and y are one distribution": how often clips dealt out at random are as far apart as these.

    Clips (groups, as in `mmd2`) stay whole. Median bandwidth, which no permutation changes. In [1 / (1 + permutations), 1]:
    the observed deal counts as one. Few clips cannot be significant: 3 against 3 have 20 deals, and the observed one ties
    with its mirror image.
    """
    assert permutations >= 1, f"permutations {permutations}"
    sums, sizes, mine = _clip_sums(x, y, _groups(x, groups_x), _groups(y, groups_y), None)
    rng = stream(seed, Purpose.BOOTSTRAP, _POSITION)
    deals = rng.permuted(np.tile(mine, (permutations, 1)), axis=1)
    observed = _statistic(sums, sizes, mine[None])[0]
    # A deal that repeats the observed one must tie with it, whatever the order of additions.
    at_least = _statistic(sums, sizes, deals) >= observed - 1e-9
    return float((1 + at_least.sum()) / (1 + permutations))


def _groups(rows: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Clip numbers 0, 1, ... of the rows."""
    if groups is None:
        return np.arange(len(rows))
    assert len(groups) == len(rows), f"{len(groups)} clip names for {len(rows)} rows"
    return np.unique(groups, return_inverse=True)[1]


def _clip_sums(
    x: np.ndarray, y: np.ndarray, groups_x: np.ndarray, groups_y: np.ndarray, bandwidth: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernel sums between clips float64 [G, G] (0 within a clip), rows per clip [G], and which clips are x's, bool [G]."""
    assert x.ndim == y.ndim == 2, f"expected [N, D] and [M, D], got {x.shape} and {y.shape}"
    assert x.shape[1] == y.shape[1], f"embeddings of different networks: {x.shape[1]} and {y.shape[1]} dimensions"
    assert min(len(set(groups_x.tolist())), len(set(groups_y.tolist()))) >= 2, "each side needs two clips"
    groups = np.concatenate([groups_x, groups_y + groups_x.max() + 1])
    order = np.argsort(groups, kind="stable")
    rows = np.concatenate([x, y]).astype(np.float64)[order]
    assert np.all(np.isfinite(rows)), "embeddings hold NaN or infinity"
    rows -= rows.mean(axis=0)  # distances stay; the subtraction in _squared loses fewer digits
    width = median_distance(rows) if bandwidth is None else bandwidth
    assert width > 0, f"bandwidth {width}"
    starts = np.searchsorted(groups[order], np.arange(groups.max() + 1))
    columns = [
        np.add.reduceat(np.exp(-_squared(rows[top : top + _ROWS], rows) / (2 * width**2)), starts, axis=1)
        for top in range(0, len(rows), _ROWS)
    ]
    sums = np.add.reduceat(np.concatenate(columns), starts, axis=0)
    np.fill_diagonal(sums, 0.0)
    return sums, np.bincount(groups).astype(np.float64), np.arange(len(starts)) <= groups_x.max()


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances between the rows of `a` and of `b`."""
    return np.maximum(np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None] - 2 * a @ b.T, 0.0)


def median_distance(rows: np.ndarray) -> float:
    """Median distance of two different rows of float [N, D]; equal rows (frozen clips) are left out, 1 where all are equal."""
    sample = rows[:: -(-len(rows) // _SAMPLE)].astype(np.float64)
    sample -= sample.mean(axis=0)
    distances = np.sqrt(_squared(sample, sample)[np.triu_indices(len(sample), 1)])
    distances = distances[distances > 1e-6]
    return float(np.median(distances)) if distances.size else 1.0


def _statistic(sums: np.ndarray, sizes: np.ndarray, deals: np.ndarray) -> np.ndarray:
    """MMD^2 float64 [P] for P ways to deal the clips: `deals` bool [P, G], True for the first side."""
    first = deals.astype(np.float64)
    second = 1 - first

    def mean(a: np.ndarray, b: np.ndarray, within: np.ndarray | float) -> np.ndarray:
        pairs = (a @ sizes) * (b @ sizes) - within
        return np.einsum("pg,pg->p", a @ sums, b) / pairs

    own = np.square(sizes)
    return mean(first, first, first @ own) + mean(second, second, second @ own) - 2 * mean(first, second, 0.0)
