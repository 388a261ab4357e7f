"""Random numbers as functions of (seed, purpose, position), never of history. No torch here.

Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key and counter pick a
stream directly, so rank, micro-step, worker and resume cannot shift a draw. `torch.Generator` on a CPU would not do: its
Mersenne twister keeps 32 bits of the seed, and 100,000 positions then collide about once.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. Values are part of every run's identity: append, never renumber."""

    ORDER = 1  # position = epoch
    POSTERIOR = 2  # position = global sample position, here and below
    NOISE = 3
    SIGMA = 4
    CAPTION_DROPOUT = 5
    ANCHOR = 6
    STRATA = 7  # position = block of strata
    HELD_OUT = 8  # position = index of the held-out item
    MODULE = 9  # position = optimiser step
    ADAPTER = 10
    SAMPLING = 11
    BOOTSTRAP = 12
    WORLD = 13  # position = index of the scene


def stream(seed: int, purpose: Purpose, position: int = 0, lane: int = 0) -> np.random.Generator:
    """The generator of one (seed, purpose, position, lane); 2^64 draws fit before the next position begins.

    `lane` splits a position further (rank and micro-step of module dropout, sigma index of the held-out loss).
    """
    counter = np.array([0, 0, position, lane], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter))


def normal(seed: int, purpose: Purpose, position: int, shape: tuple[int, ...], lane: int = 0) -> np.ndarray:
    """Standard normal float32 of `shape`."""
    return stream(seed, purpose, position, lane).standard_normal(shape, dtype=np.float32)


def uniform(seed: int, purpose: Purpose, position: int) -> float:
    """One float64 in [0, 1)."""
    return float(stream(seed, purpose, position).random())
