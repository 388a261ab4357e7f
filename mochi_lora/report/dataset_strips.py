"""A clip's frames side by side in one small picture: those that training will see, cropped as it will see them."""

import io
from base64 import b64encode
from bisect import bisect_left
from collections.abc import Sequence

from PIL import Image, ImageOps

from mochi_lora.data.clip_plan import ClipPlan
from mochi_lora.data.decode import read_stills
from mochi_lora.data.geometry import nearest_frames, shown_size
from mochi_lora.data.probe import ClipInfo
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError

FRAMES = 5
_HEIGHT = 96  # pixels of a strip
_GAP = 2
_QUALITY = 70
_SAME_TIME = 1e-6  # seconds


def strip(plan: ClipPlan, info: ClipInfo) -> str:
    """A JPEG data URI of up to five frames, evenly spaced over what is used of the clip, first and last among them.

    Some 10 to 25 kB. Raises ClipError where a frame cannot be decoded.
    """
    source, bucket = plan.source, plan.bucket
    chosen = nearest_frames(info.times, info.frame_seconds, bucket.frames, source.start, source.end)
    return _joined(source, info, chosen, bucket.width / bucket.height)


def strip_of_source(source: ClipSource, info: ClipInfo) -> str:
    """The same of a clip that training does not take: its range and crop, whatever bucket it might go into.

    Raises ClipError where a frame cannot be decoded or there is none.
    """
    first = bisect_left(info.times, source.start - _SAME_TIME)
    stop = len(info.times) if source.end is None else bisect_left(info.times, source.end - _SAME_TIME)
    if first >= stop:
        message = f"{source.name}: no frame between {source.start:g} s and {source.end} s of {info.duration:.3f} s; mend it"
        raise ClipError(message)
    width, height = shown_size(info, source)
    return _joined(source, info, range(first, stop), width / height)


def _joined(source: ClipSource, info: ClipInfo, chosen: Sequence[int], aspect: float) -> str:
    last = len(chosen) - 1
    wanted = sorted({chosen[round(place * last / (FRAMES - 1))] for place in range(FRAMES)})
    width = max(1, round(_HEIGHT * aspect))
    stills = read_stills(source, info, wanted, 4 * max(width, _HEIGHT))
    joined = Image.new("RGB", (len(stills) * (width + _GAP) - _GAP, _HEIGHT), "grey")
    for place, still in enumerate(stills):
        picture = ImageOps.fit(Image.fromarray(still), (width, _HEIGHT), Image.Resampling.LANCZOS)  # cut at the centre
        joined.paste(picture, (place * (width + _GAP), 0))
    target = io.BytesIO()
    joined.save(target, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{b64encode(target.getvalue()).decode('ascii')}"
