"""Videos side by side in one: a row per prompt, a column per version, labelled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mochi_lora.data.probe import probe
from mochi_lora.inference.playback import decode
from mochi_lora.inference.video import write_mp4_stream

_WIDEST, _TALLEST = 1920, 2160  # pixels of the whole; x264 goes further, players and screens do not
_NARROWEST = 192  # of a tile: room for its label
_FONT_SIZE = 14
_BAND = 24
_GAP = 4


@dataclass(frozen=True)
class GridRow:
    """One row: its title and a video per column."""

    title: str
    videos: tuple[Path, ...]


def write_grids(folder: Path, columns: Sequence[str], rows: Sequence[GridRow], stem: str = "grid") -> list[Path]:
    """Write `grid.mp4` (`grid-1.mp4`, ... where the rows do not fit into one) of videos that are all of one size.

    Nothing is held in memory but one frame of each video. A video that ends before the longest keeps its last frame.
    """
    assert rows, "a grid of nothing"
    assert all(len(row.videos) == len(columns) for row in rows), "a video for every row and column"
    first = probe(rows[0].videos[0])
    width = _even(min(max(first.width, _NARROWEST), (_WIDEST - _GAP) // len(columns) - _GAP))
    height = _even(width * first.height / first.width)
    per_page = max(1, (_TALLEST - _BAND) // (_BAND + height + _GAP))
    pages = [rows[start : start + per_page] for start in range(0, len(rows), per_page)]
    names = [f"{stem}.mp4"] if len(pages) == 1 else [f"{stem}-{number}.mp4" for number in range(1, len(pages) + 1)]
    for name, page in zip(names, pages, strict=True):
        canvas, corners = _canvas(columns, page, width, height)
        write_mp4_stream(folder / name, _frames(page, canvas, corners, (width, height)), *canvas.shape[:2])
    return [folder / name for name in names]


def _even(pixels: float) -> int:
    return max(2, 2 * int(pixels / 2))


def _canvas(
    columns: Sequence[str], rows: Sequence[GridRow], width: int, height: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The picture without its tiles, uint8 [H, W, 3], and (left, top) of each tile, row by row."""
    row_height = _BAND + height + _GAP
    size = (_GAP + len(columns) * (width + _GAP), _BAND + len(rows) * row_height)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=_FONT_SIZE)
    lefts = [_GAP + number * (width + _GAP) for number in range(len(columns))]
    for left, label in zip(lefts, columns, strict=True):
        draw.text((left, _GAP), _cut(label, font, width), fill="black", font=font)
    tops = [_BAND + number * row_height for number in range(len(rows))]
    for top, row in zip(tops, rows, strict=True):
        draw.text((_GAP, top + _GAP), _cut(row.title, font, size[0] - 2 * _GAP), fill="black", font=font)
    return np.asarray(picture), [(left, top + _BAND) for top in tops for left in lefts]


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` as far as it fits into `width` pixels."""
    text = " ".join(text.split())
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text.rstrip()}..." if text else ""
    return shown


def _frames(
    rows: Sequence[GridRow], canvas: np.ndarray, corners: Sequence[tuple[int, int]], size: tuple[int, int]
) -> Iterator[np.ndarray]:
    infos = [probe(path) for row in rows for path in row.videos]
    films = [map(partial(_shrunk, size=size), decode(info)) for info in infos]
    shown: list[np.ndarray | None] = [None] * len(films)
    for _ in repeat(None, max(len(info.times) for info in infos)):
        frame = canvas.copy()
        for number, (film, (left, top)) in enumerate(zip(films, corners, strict=True)):
            tile = shown[number] = next(film, shown[number])
            assert tile is not None, "a video without frames passed the probe"
            frame[top : top + size[1], left : left + size[0]] = tile
        yield frame


def _shrunk(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if frame.shape[:2] == size[::-1]:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
