"""Letterbox and pillarbox bars: black edges that stay for a whole shot, and the crop that takes them off."""

import math

import numpy as np

from mochi_lora.curation.survey import Survey

_UNLIT = 0.02  # of a line's pixels may shine and it is still bar: a logo's edge, ringing of the codec
_PICTURE = 0.5  # of the first line inside must shine at some time: a planet in black space has no bars
_THIN = 0.01  # of the side; a line or two of black is common, and cropped by nobody
_MOST = 0.45  # of the side, on each edge


def find_bars(survey: Survey, first: int, stop: int) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) in pixels as shown, right and bottom exclusive, of what frames [first, stop) show inside bars.

    None where there are none. Edges lie on even pixels, inside the picture by up to one line of the 360 looked at.
    """
    looks = (survey.looks >= first) & (survey.looks < stop)
    if not looks.any():
        return None
    left, right = _edges(survey.lit_columns[looks].max(axis=0) / 255, survey.width)
    top, bottom = _edges(survey.lit_rows[looks].max(axis=0) / 255, survey.height)
    crop = (left, top, right, bottom)
    return None if crop == (0, 0, survey.width, survey.height) else crop


def _edges(lit: np.ndarray, side: int) -> tuple[int, int]:
    """Begin and end in pixels of what is lit, along one side with `lit` share per line."""
    scale = side / len(lit)
    before, after = _bar(lit), _bar(lit[::-1])
    begin = 2 * math.ceil((before + 1) * scale / 2) if before else 0
    end = side - 2 * math.ceil((after + 1) * scale / 2) if after else side
    return (begin, end) if begin < end else (0, side)


def _bar(lit: np.ndarray) -> int:
    """Lines of bar from the edge on; 0 where what follows does not look like the straight edge of a picture."""
    inside = np.flatnonzero(lit > _UNLIT)
    if not len(inside):
        return 0
    lines = int(inside[0])
    if not _THIN * len(lit) <= lines <= _MOST * len(lit):
        return 0
    return lines if lit[lines : lines + 2].max() >= _PICTURE else 0
