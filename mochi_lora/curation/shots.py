"""Shots of a surveyed source: what lies between cuts, fades and dissolves. Exact to the frame; no clip may straddle one.

Hard cuts are PySceneDetect's. It knows nothing of dissolves, and fades only by a brightness. Both are linear mixes: a frame
in one is the mean of those a quarter of a second before and after, and these two differ much. Measured at 8 x 4 pixels of
colour on ten filmed and drawn shots without one: where the frame is within 25 % of that mean, the two differ by at most 10
(of 255). In fades and dissolves, of 8 to 24 frames between moving shots, they differ by 33 to 150. Not found are dissolves
between shots of the same colours, and mixes longer than two seconds: those are as likely a zoom or a light that changes. A
fade to or from black is one however long.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mochi_lora.curation.survey import Survey

_MIX_SPREAD, _MIX_BEND = 14.0, 0.25
_LONGEST_MIX = 2.0  # seconds
_LONG_BLACK = 1.0  # seconds; shorter is part of a fade, longer a stretch of its own that the filter names


@dataclass(frozen=True)
class Shot:
    """Frames [first, stop) of a source with no transition in them."""

    first: int
    stop: int


@dataclass(frozen=True)
class Border:
    """Frames [first, stop) that belong to no shot; none for a hard cut. `at` is the frame to name it by."""

    first: int
    stop: int
    at: int
    hard: bool


def find_shots(survey: Survey, black: float) -> tuple[list[Shot], list[Border]]:
    """Shots and what separates them, both in order. `black` is the luma (0 to 1) up to which a frame counts as black."""
    borders = find_borders(survey, black)
    edges = [(0, 0), *((border.first, border.stop) for border in borders), (len(survey.times), len(survey.times))]
    shots = [Shot(stop, first) for (_, stop), (first, _) in pairwise(edges) if first > stop]
    return shots, borders


def find_borders(survey: Survey, black: float) -> list[Border]:
    """Cuts, fades, dissolves and short black, those that touch joined; ascending, apart from each other."""
    dark = black_frames(survey, black)
    found = [Border(int(cut), int(cut), int(cut), hard=True) for cut in survey.cuts]
    found += _mixes(survey, dark)
    for first, stop in runs(dark):
        if (stop - first) * survey.frame_seconds < _LONG_BLACK:
            found.append(Border(first, stop, first, hard=False))
        else:
            found += [Border(edge, edge, edge, hard=True) for edge in (first, stop)]
    count = len(survey.times)
    joined = _joined(sorted(found, key=lambda border: (border.first, border.stop)), survey.around)
    return [_named(border, survey, dark) for border in joined if border.stop > 0 and border.first < count]


def black_frames(survey: Survey, black: float) -> np.ndarray:
    """bool [N]: dark and without contrast; a title on black ground is no black frame."""
    return (survey.luma <= black * 255) & (survey.contrast <= black * 255)


def _mixes(survey: Survey, dark: np.ndarray) -> Iterator[Border]:
    """Each run of frames between which the picture only fades, widened to where the fade begins and ends."""
    around = survey.around
    for first, stop in runs((survey.spread > _MIX_SPREAD) & (survey.bend < _MIX_BEND)):
        begin, end = max(0, first - around), min(len(survey.times), stop + around)
        # `bend` is above its limit for the first and last twelfth of a second of a mix between still pictures.
        seconds = (stop - first + 2 * around / 3) * survey.frame_seconds
        bounded = seconds <= _LONGEST_MIX + survey.frame_seconds / 2 or dark[begin:end].any()
        if stop - first >= min(3, around) and bounded:
            yield Border(begin, end, (first + stop) // 2, hard=False)


def _joined(borders: list[Border], gap: int) -> list[Border]:
    """Hard cuts stay apart from each other, however near; a fade takes in what lies within `gap` frames of it."""
    joined: list[Border] = []
    for border in borders:
        last = joined[-1] if joined else None
        apart = last is None or border.first - last.stop > (0 if last.hard and border.hard else gap)
        if last is None or apart or (last.hard and border.hard and border.first != last.first):
            joined.append(border)
            continue
        first, stop = last.first, max(last.stop, border.stop)
        at = next((one.at for one in (last, border) if one.hard), (first + stop) // 2)
        joined[-1] = Border(first, stop, at, hard=last.hard and border.hard)
    return joined


def _named(border: Border, survey: Survey, dark: np.ndarray) -> Border:
    """A fade through black is named by the middle of its darkest frames."""
    inside = slice(border.first, border.stop)
    if border.hard or not dark[inside].any():
        return border
    luma = survey.luma[inside]
    darkest = np.flatnonzero(luma <= luma.min() + 1)
    return Border(border.first, border.stop, border.first + int(np.median(darkest)), hard=False)


def runs(marks: np.ndarray) -> list[tuple[int, int]]:
    """[first, stop) of each run of true in bool [N]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8)))
    return [(int(first), int(stop)) for first, stop in edges.reshape(-1, 2)]
