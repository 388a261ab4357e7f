"""Pixels to files people open: mp4 at Mochi's frame rate, and contact sheets.

Frames here are uint8 [F, H, W, 3], full-range RGB.
"""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont

from mochi_lora.files import write_atomic
from mochi_lora.spec import FRAMES_PER_SECOND

_QUALITY = "17"  # x264's CRF: 18 is about where people stop seeing a loss
_BT709 = 1  # the same code for primaries, transfer and matrix (ITU-T H.273)
_THUMBNAIL_WIDTH = 320
_MARGIN = 12
_FONT_SIZE = 20
_NAME_LENGTH = 40


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Pixels [3, F, H, W] of any float dtype in [-1, 1] (clamped) -> uint8 [F, H, W, 3], rounded to nearest."""
    scaled = (pixels.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """Write `frames` uint8 [F, H, W, 3] as H.264 at 30 per second, atomically; H and W even (yuv420p), at least one frame."""
    count, height, width, channels = frames.shape
    assert frames.dtype == np.uint8, f"expected uint8, got {frames.dtype}"
    assert channels == 3, f"expected [F, H, W, 3], got {frames.shape}"
    assert count > 0, "no frames"
    write_mp4_stream(path, frames, height, width)


def write_mp4_stream(path: Path, frames: Iterable[np.ndarray], height: int, width: int) -> None:
    """As `write_mp4`, from frames uint8 [H, W, 3] that need not lie in memory together."""
    assert (height % 2, width % 2) == (0, 0), f"yuv420p needs even sizes, got {height}x{width}"
    write_atomic(path, partial(_encode, frames=frames, height=height, width=width))


def _encode(path: Path, *, frames: Iterable[np.ndarray], height: int, width: int) -> None:
    # The temporary name does not end in .mp4, so the container cannot be guessed from it.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": _QUALITY, "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        for pixels in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            # Tags alone would lie: the default conversion is BT.601, and players would show shifted hues.
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))


def video_name(number: int, prompt: str, seed: int) -> str:
    """File name of one video: its number in the call, the prompt's first words, the seed."""
    return f"{number:03d}-{first_words(prompt)}-seed{seed}.mp4"


def first_words(prompt: str) -> str:
    """The beginning of `prompt` as part of a file name; "prompt" where nothing of it fits into one."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_NAME_LENGTH].strip("-") or "prompt"


def glimpse(frames: np.ndarray) -> np.ndarray:
    """About six evenly spaced frames of [F, H, W, 3] for a contact sheet, so that no whole clip is kept for it."""
    return frames[:: max(1, len(frames) // 6)].copy()


def write_contact_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], columns: int = 6) -> None:
    """Write a PNG: per row its title (wrapped) over up to `columns` evenly spaced frames, the first and last included.

    Each row is (title, uint8 [F, H, W, 3]); rows may differ in size and length. The built-in font has no CJK glyphs.
    """
    assert rows, "a contact sheet of nothing"
    strips = [_row(title, frames, columns) for title, frames in rows]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _row(title: str, frames: np.ndarray, columns: int) -> Image.Image:
    font = ImageFont.load_default(size=_FONT_SIZE)
    height = max(1, round(frames.shape[1] * _THUMBNAIL_WIDTH / frames.shape[2]))
    width = columns * (_THUMBNAIL_WIDTH + _MARGIN) + _MARGIN
    text = _wrap(title, font, width - 2 * _MARGIN)
    _, _, _, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((_MARGIN, _MARGIN), text or " ", font=font)
    top = round(bottom) + _MARGIN
    strip = Image.new("RGB", (width, top + height + _MARGIN), "white")
    ImageDraw.Draw(strip).multiline_text((_MARGIN, _MARGIN), text, fill="black", font=font)
    chosen = np.unique(np.linspace(0, len(frames) - 1, columns).round().astype(int))
    for column, index in enumerate(chosen):
        thumbnail = Image.fromarray(frames[index]).resize((_THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS)
        strip.paste(thumbnail, (_MARGIN + column * (_THUMBNAIL_WIDTH + _MARGIN), top))
    return strip


def _wrap(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`title` in lines of at most `width` pixels; words too long for a line are cut."""
    longest = width // _FONT_SIZE  # characters: no glyph of this font is wider than it is tall
    words = [word[start : start + longest] for word in title.split() for start in range(0, len(word), longest)]
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
