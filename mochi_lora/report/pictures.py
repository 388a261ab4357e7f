"""Videos and pictures made small and written as data, so that the page holds them itself."""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from mochi_lora.data.probe import ClipInfo, probe
from mochi_lora.errors import UserError
from mochi_lora.evaluation.results import Pair
from mochi_lora.inference.playback import decode

WIDEST = 320  # pixels; wider videos are made smaller for the page
_QUALITY = "28"  # x264's CRF
_BT709 = 1  # as in inference.video
_AS_IT_IS = 400_000  # bytes: a video this small and narrow goes in unchanged
MOST_PAIRS = 24
MOST_BYTES = 20_000_000  # of videos, before base64 adds a third


@dataclass(frozen=True)
class Side:
    """One video of the page: data URIs, both empty when the page only links to it."""

    link: str
    video: str = ""
    poster: str = ""
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Shown:
    """A pair as the page shows it."""

    pair: Pair
    base: Side
    adapter: Side


def embed(folder: Path, pairs: Sequence[Pair], *, most_pairs: int = MOST_PAIRS, most_bytes: int = MOST_BYTES) -> list[Shown]:
    """`pairs` in their order, as many of them as the bounds allow with their videos, the others as links.

    Prompt sets take turns, so that no set crowds out another. Raises UserError when a video is not there.
    """
    left = most_bytes
    shown: dict[int, Shown] = {}
    for turn, index in enumerate(_in_turns(pairs)):
        pair = pairs[index]
        base, adapter = Side(quote(pair.base_video)), Side(quote(pair.adapter_video))
        if turn < most_pairs and left > 0:
            made = _side(folder, pair.base_video), _side(folder, pair.adapter_video)
            left -= sum(len(side.video) * 3 // 4 for side in made)
            if left >= 0:
                base, adapter = made
        shown[index] = Shown(pair, base, adapter)
    return [shown[index] for index in range(len(pairs))]


def _in_turns(pairs: Sequence[Pair]) -> list[int]:
    """Positions of `pairs`: the first of each prompt set, then the second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for index, pair in enumerate(pairs):
        seen[pair.prompt_set] = seen.get(pair.prompt_set, -1) + 1
        turns.append((seen[pair.prompt_set], index))
    return [index for _, index in sorted(turns)]


def _side(folder: Path, name: str) -> Side:
    path = there(folder, name)
    info = probe(path)
    first = Image.fromarray(next(iter(decode(info))))
    content = path.read_bytes() if _fits(path, info) else shrunk(info)
    return Side(quote(name), _uri("video/mp4", content), _jpeg(first), info.width, info.height)


def there(folder: Path, name: str) -> Path:
    """`folder`/`name`; raises UserError where that is no file."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: the evaluation names this file, but it is gone; run the evaluation again to make it")
    return path


def _fits(path: Path, info: ClipInfo) -> bool:
    """Whether the file can go in as it is: small, and of the one kind that every browser plays."""
    if info.light or info.interlaced or info.stored:  # shown otherwise than stored
        return False
    if info.width > WIDEST or info.rotation or path.suffix != ".mp4" or path.stat().st_size > _AS_IT_IS:
        return False
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")


def shrunk(info: ClipInfo) -> bytes:
    """The video as an H.264 mp4 at most `WIDEST` pixels wide: same frames, same rate, smaller and coarser."""
    width = max(2, min(WIDEST, info.width) // 2 * 2)
    height = max(2, round(info.height * width / info.width / 2) * 2)
    rate = Fraction(1 / info.frame_seconds).limit_denominator(1001)
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": _QUALITY, "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        for pixels in decode(info):
            small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
            frame = av.VideoFrame.from_ndarray(small, format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    return target.getvalue()


def embed_picture(folder: Path, name: str) -> str:
    """The picture as a JPEG data URI, at most 640 pixels wide."""
    with Image.open(there(folder, name)) as picture:
        return _jpeg(picture.convert("RGB"), widest=2 * WIDEST)


def _jpeg(picture: Image.Image, widest: int = WIDEST) -> str:
    picture.thumbnail((widest, widest * 4), Image.Resampling.LANCZOS)
    target = io.BytesIO()
    picture.save(target, "JPEG", quality=80)
    return _uri("image/jpeg", target.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode('ascii')}"
