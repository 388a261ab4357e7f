"""The before/after sheet: one picture that shows what an adapter does, base left and adapter right."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mochi_lora.data.probe import probe
from mochi_lora.evaluation.results import Pair
from mochi_lora.files import write_atomic
from mochi_lora.inference.playback import decode
from mochi_lora.report.pictures import there

_STRIP = 4  # frames per video in the before/after sheet
_THUMBNAIL = 208
_GAP, _MARGIN, _GUTTER = 6, 24, 28
_FONT, _HEAD = 18, 22
_INK, _FAINT, _ACCENT = "#1c1d20", "#5d626b", "#0b5fa5"


def write_before_after(path: Path, folder: Path, pairs: Sequence[Pair], *, rows: int = 8) -> Path:
    """Write a PNG: per pair its prompt over four frames of the base's video and four of the adapter's, at most `rows` pairs.

    Raises UserError when a video is not there. The built-in font has no CJK glyphs.
    """
    assert pairs, "a before/after sheet of nothing"
    strips = [_row(folder, pair) for pair in pairs[:rows]]
    width = strips[0].width
    head = _headline(width)
    sheet = Image.new("RGB", (width, head.height + sum(strip.height for strip in strips) + _MARGIN), "white")
    top = 0
    for strip in (head, *strips):
        sheet.paste(strip, (0, top))
        top += strip.height
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))
    return path


def _half() -> int:
    """Width of one strip of frames."""
    return _STRIP * (_THUMBNAIL + _GAP) - _GAP


def _headline(width: int) -> Image.Image:
    head = Image.new("RGB", (width, _MARGIN + _HEAD + 10), "white")
    draw, font = ImageDraw.Draw(head), ImageFont.load_default(size=_HEAD)
    draw.text((_MARGIN, _MARGIN), "Base model", fill=_FAINT, font=font)
    draw.text((_MARGIN + _half() + _GUTTER, _MARGIN), "With the adapter", fill=_ACCENT, font=font)
    return head


def _row(folder: Path, pair: Pair) -> Image.Image:
    strips = [_strip(there(folder, name)) for name in (pair.base_video, pair.adapter_video)]
    width = 2 * _MARGIN + 2 * _half() + _GUTTER
    font = ImageFont.load_default(size=_FONT)
    letters = max(20, int(0.95 * (width - 2 * _MARGIN) / (font.getlength(pair.prompt or " ") / max(1, len(pair.prompt)))))
    lines = textwrap.wrap(pair.prompt, letters) or ["(no prompt)"]
    text_height = len(lines) * (_FONT + 6)
    row = Image.new("RGB", (width, 12 + text_height + 6 + max(strip.height for strip in strips)), "white")
    draw = ImageDraw.Draw(row)
    for index, line in enumerate(lines):
        draw.text((_MARGIN, 12 + index * (_FONT + 6)), line, fill=_INK, font=font)
    row.paste(strips[0], (_MARGIN, 18 + text_height))
    row.paste(strips[1], (_MARGIN + _half() + _GUTTER, 18 + text_height))
    return row


def _strip(path: Path) -> Image.Image:
    info = probe(path)
    height = max(1, round(info.height * _THUMBNAIL / info.width))
    strip = Image.new("RGB", (_half(), height), "white")
    places = [round(column * (len(info.times) - 1) / (_STRIP - 1)) for column in range(_STRIP)]
    for index, frame in enumerate(decode(info)):
        for column in (column for column, place in enumerate(places) if place == index):
            thumbnail = Image.fromarray(frame).resize((_THUMBNAIL, height), Image.Resampling.LANCZOS)
            strip.paste(thumbnail, (column * (_THUMBNAIL + _GAP), 0))
    return strip
