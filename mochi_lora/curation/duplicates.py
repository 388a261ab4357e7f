"""The same footage twice: re-encoded, scaled, cut out again. Found by what the picture looks like over time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mochi_lora.curation.manifest import Clip

_BLOCK = 256  # clips compared with all others at once


@dataclass(frozen=True)
class Twin:
    """A clip (by its place in the list) that shows what a better one shows."""

    clip: int
    better: int
    bits: float  # mean difference of their picture hashes, of 64


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
    hashes = np.array([[int(text, 16) for text in clips[place].measures.hashes] for place in order], dtype=np.uint64)
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


def _distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float32 [A, B]: mean number of bits that differ between uint64 [A, instants] and [B, instants]."""
    total = np.zeros((len(some), len(others)), np.float32)
    for instant in range(some.shape[1]):
        total += np.bitwise_count(some[:, None, instant] ^ others[None, :, instant])
    return total / some.shape[1]
