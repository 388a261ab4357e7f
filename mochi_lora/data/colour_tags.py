"""What a video's code values mean, from its tags and metadata. Refuses by name what no reader of ours converts rightly.

Only tags count: HDR footage without them looks like grey SDR to every program, and cannot be told from it.
"""

from pathlib import Path

import numpy as np
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mochi_lora.data.tone_map import LEAST_PEAK, Light, Primaries, Transfer
from mochi_lora.errors import ClipError

# Numbers of ITU-T H.273, tables 2 to 4.
_UNSPECIFIED = 2
_HDR_TRANSFERS: dict[int, Transfer] = {16: "PQ", 18: "HLG"}
_PRIMARIES: dict[int, Primaries] = {1: "BT.709", 9: "BT.2020", 12: "P3"}
# swscale would read each of these as something else, without a word.
_UNREAD_TRANSFERS = {8: "linear light", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428"}
_UNREAD_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 11: "Y'D'zD'x", 12: "chromaticity-derived"}
_UNREAD_MATRICES |= {13: "chromaticity-derived", 14: "ICtCp", 15: "IPT-PQ-C2", 16: "YCgCo-Re", 17: "YCgCo-Ro"}
_HIGHEST_PQ = 10000.0  # cd/m2


def light_of(path: Path, stream: VideoStream, frame: VideoFrame) -> Light | None:
    """How `data.tone_map` must read the file; None for plain SDR and for untagged video. `frame` is its first.

    Raises ClipError where the colours are coded in a way that would come out wrong.
    """
    coded = stream.codec_context
    transfer = _either(int(coded.color_trc), int(frame.color_trc))
    primaries = _either(int(coded.color_primaries), int(frame.color_primaries))
    matrix = _either(int(coded.colorspace), int(frame.colorspace))
    unread = _UNREAD_TRANSFERS.get(transfer) or _UNREAD_MATRICES.get(matrix)
    if transfer == _UNSPECIFIED and "DOVI_METADATA" in frame.side_data:  # HDR10, HLG or SDR inside would be tagged
        unread = "Dolby Vision alone, with no HDR10, HLG or SDR picture inside"
    if unread:
        raise ClipError(f"{path}: colours coded as {unread}, which cannot be converted rightly here; export it as BT.709 SDR")
    if transfer in _HDR_TRANSFERS:
        peak = _peak(frame) if _HDR_TRANSFERS[transfer] == "PQ" else LEAST_PEAK
        return Light(_HDR_TRANSFERS[transfer], _PRIMARIES.get(primaries, "BT.2020"), peak)
    gamut = _PRIMARIES.get(primaries, "BT.709")
    return None if gamut == "BT.709" else Light("SDR", gamut)


def _either(stream_tag: int, frame_tag: int) -> int:
    return frame_tag if stream_tag == _UNSPECIFIED else stream_tag


def _peak(frame: VideoFrame) -> float:
    """Brightest pixel (MaxCLL) in cd/m2, else the mastering display's white, else what nearly all footage has.

    Reads FFmpeg's AVContentLightMetadata and AVMasteringDisplayMetadata (libavutil/mastering_display_metadata.h).
    """
    level = frame.side_data.get("CONTENT_LIGHT_LEVEL")
    if isinstance(level, SideData) and (brightest := int(np.frombuffer(bytes(level), "<u4", 1)[0])):
        return min(float(brightest), _HIGHEST_PQ)
    display = frame.side_data.get("MASTERING_DISPLAY_METADATA")
    if isinstance(display, SideData):
        numbers = np.frombuffer(bytes(display), "<i4", 22)  # ten rationals: primaries, white, darkest, brightest; two flags
        numerator, denominator, has_luminance = int(numbers[18]), int(numbers[19]), int(numbers[21])
        if has_luminance and numerator > 0 and denominator > 0:
            return min(numerator / denominator, _HIGHEST_PQ)
    return LEAST_PEAK
