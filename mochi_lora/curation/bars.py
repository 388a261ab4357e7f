"""Letterbox and pillarbox bars: black edges that stay for a whole shot, and the crop that takes them off."""

import math

import numpy as np

Crop = tuple[int, int, int, int]  # left, top, right, bottom in pixels as shown, right and bottom exclusive

_LIT = 32  # luma above which a pixel is no bar: 16 is black in studio range read as full range, and codecs ring
_UNLIT = 0.02  # of a line's pixels may shine and it is still bar: a logo's edge, ringing of the codec
_PICTURE = 0.5  # of the first line inside must shine at some time: a planet in black space has no bars
_THIN = 0.01  # of the side; a line or two of black is common, and cropped by nobody
_MOST = 0.45  # of the side, on each edge


def lit_lines(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the pixels of each row and of each column of uint8 [H, W] that are not black; uint8, 255 is all."""
    lit = grey > _LIT
    rows, columns = (np.round(lit.mean(axis=axis) * 255).astype(np.uint8) for axis in (1, 0))
    return rows, columns


def find_bars(lit_rows: np.ndarray, lit_columns: np.ndarray, width: int, height: int, *, inwards: int = 1) -> Crop | None:
    """What a picture of `width` x `height` shows inside the bars that all looks have; `lit_lines` of each, [looks, lines].

    None where there are none. Edges lie on even pixels, inside the picture by up to `inwards` lines of the 360 looked at: one
    so that a crop keeps nothing of a bar; none to measure by, where a copy without bars is to look the same. A dark look has
    bars everywhere, and so takes none away.
    """
    if not len(lit_rows):
        return None
    left, right = _edges(lit_columns.max(axis=0) / 255, width, inwards)
    top, bottom = _edges(lit_rows.max(axis=0) / 255, height, inwards)
    crop = (left, top, right, bottom)
    return None if crop == (0, 0, width, height) else crop


def alike(one: Crop | None, other: Crop | None, width: int, height: int) -> bool:
    """Whether two crops of a picture differ by no more than what nobody crops."""
    if one is None or other is None:
        return one is other
    return all(abs(a - b) <= max(2, _THIN * side) for a, b, side in zip(one, other, (width, height) * 2, strict=True))


def _edges(lit: np.ndarray, side: int, inwards: int) -> tuple[int, int]:
    """Begin and end in pixels of what is lit, along one side with `lit` share per line."""
    scale = side / len(lit)
    before, after = _bar(lit), _bar(lit[::-1])
    begin = 2 * math.ceil((before + inwards) * scale / 2) if before else 0
    end = side - 2 * math.ceil((after + inwards) * scale / 2) if after else side
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
