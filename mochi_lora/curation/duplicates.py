"""The same footage twice: re-encoded, scaled, trimmed, cut out again. Found by what the picture looks like over time.

Every clip is held against every better one, at every shift in time: the work grows with the square of the number of clips,
and with their length. On one core 5,000 clips of 37 frames take some 2 s, of 163 frames some 6 s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mochi_lora.curation.manifest import Clip

_BLOCK = 256  # clips compared with all others at once
_PROBES = 8  # instants of a clip that are looked for in another


@dataclass(frozen=True)
class Twin:
    """A clip (by its place in the list) that shows what a better one shows."""

    clip: int
    better: int
    bits: float  # mean difference of their picture hashes where they are most alike, of 64


@dataclass(frozen=True)
class Compared:
    """Every clip held against those that are better."""

    twins: list[Twin]
    nearest: list[float | None]  # bits to the nearest better clip of another shot, itself a twin or not; None for the best


def compare_clips(clips: Sequence[Clip], limit: float | None) -> Compared:
    """`twins` are the clips that differ by at most `limit` bits from a better one that stays, by place; none without a limit.

    Clips of one shot are no duplicates of each other: how many a shot gives was decided when it was split. Better is
    longer, then larger in pixels, then sharper, then earlier in the list. Each clip is compared with the kept ones from the
    best down, so that of a chain of near ones the ends may both stay.
    """
    nearest: list[float | None] = [None] * len(clips)
    if not clips:
        return Compared([], nearest)
    order = sorted(range(len(clips)), key=lambda place: _worth(clips[place], place))
    hashes = [np.array([int(text, 16) for text in clips[place].measures.hashes], dtype=np.uint64) for place in order]
    shots = _numbered([(clips[place].file_name, clips[place].shot) for place in order])
    twin_of: dict[int, tuple[int, float]] = {}
    for begin in range(0, len(order), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        bits = _distances(hashes[block], hashes[: begin + _BLOCK])
        bits[shots[block, None] == shots[None, : begin + _BLOCK]] = np.inf
        for row, to_others in zip(range(begin, min(begin + _BLOCK, len(order))), bits, strict=True):
            to_better = to_others[:row]
            least = float(to_better.min(initial=np.inf))
            nearest[order[row]] = least if np.isfinite(least) else None
            if limit is None or least > limit:
                continue
            staying = [int(other) for other in np.flatnonzero(to_better <= limit) if int(other) not in twin_of]
            if staying:
                other = min(staying, key=lambda place: to_better[place])
                twin_of[row] = (other, float(to_better[other]))
    twins = (Twin(order[row], order[other], bits) for row, (other, bits) in twin_of.items())
    return Compared(sorted(twins, key=lambda twin: twin.clip), nearest)


def _worth(clip: Clip, place: int) -> tuple[float, int, float, int]:
    """Ascending from the best."""
    measures = clip.measures
    return (-round(clip.end - clip.start, 3), -measures.width * measures.height, -(measures.sharpness or 0.0), place)


def _numbered(keys: list[tuple[str, int]]) -> np.ndarray:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def _distances(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [A, B]: mean number of bits that differ between the hashes of A and of B clips, uint64 [instants] each."""
    bits = np.full((len(some), len(others)), np.inf, np.float32)
    for length, rows in _by_length(some).items():
        for other_length, columns in _by_length(others).items():
            if not length or not other_length:
                continue
            one, other = np.stack([some[row] for row in rows]), np.stack([others[column] for column in columns])
            bits[np.ix_(rows, columns)] = _best_aligned(one, other)
    return bits


def _by_length(hashes: Sequence[np.ndarray]) -> dict[int, list[int]]:
    """Places in `hashes` by number of instants."""
    places: dict[int, list[int]] = {}
    for place, its in enumerate(hashes):
        places.setdefault(len(its), []).append(place)
    return places


def _best_aligned(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float32 [A, B]: the distance of uint64 [A, n] to [B, m] where they are most alike, over all shifts in time that leave
    half of the shorter in common.

    Of the n instants at most `_PROBES` are looked for: a pair costs some `_PROBES` (n + m) / 2 comparisons of 64 bits.
    """
    n, m = some.shape[1], others.shape[1]
    least = -(-min(n, m) // 2)
    probes = np.unique(np.linspace(0, n - 1, min(n, _PROBES)).round().astype(int)).tolist()
    nearest = np.full((len(some), len(others)), np.inf, np.float32)
    for shift in range(least - n, m - least + 1):
        inside = [probe for probe in probes if 0 <= probe + shift < m]
        if not inside:
            continue
        total = np.zeros(nearest.shape, np.uint16)
        for probe in inside:
            total += np.bitwise_count(some[:, probe, None] ^ others[None, :, probe + shift])
        np.minimum(nearest, total / np.float32(len(inside)), out=nearest)
    return nearest
