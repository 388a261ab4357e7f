"""HDR and wide-gamut pictures to the SDR that everything after this room assumes: BT.709 colours, BT.1886 display, 8 bits.

    signal -> light on the mastering display -> brightness curve -> BT.709 primaries -> colours it lacks -> signal

* Light: PQ is SMPTE ST 2084; HLG is the inverse OETF and the OOTF of ITU-R BT.2100-2 for a 1000 cd/m2 display (gamma 1.2).
* Brightness: the EETF of ITU-R BT.2390-11, section 5.4.1, down to 203 cd/m2, which BT.2408 makes HDR's reference white; so
  SDR's white is the reference white of HDR, the scale libplacebo and mpv use. The curve is applied to the largest of R, G, B
  and scales all three alike: colours keep their hue and saturation, no channel clips.
* Gamut: what BT.709 can show is kept as it is; what it cannot goes straight towards the grey of its own luminance until it
  fits. On that line of linear light the dominant wavelength stays; cutting channels off would turn orange into yellow.
* Signal: L ** (1 / 2.4), the inverse of BT.1886 with black at zero.

For a peak up to 1000 cd/m2, reference white becomes 0.90 of full signal, and everything below 88 cd/m2 (half of all PQ code
values) keeps its light exactly. The curve depends on the file's metadata alone, never on the picture: no flicker.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

Transfer = Literal["PQ", "HLG", "SDR"]
Primaries = Literal["BT.2020", "P3", "BT.709"]

REFERENCE_WHITE = 203.0  # cd/m2, ITU-R BT.2408-7, table 1
# Files mastered darker than this get the same curve as this: understated metadata must not clip, and one curve for nearly
# all footage keeps a data set of one brightness.
LEAST_PEAK = 1000.0
_PQ_PEAK = 10000.0
_DISPLAY_GAMMA = 2.4  # ITU-R BT.1886
_HLG_GAMMA = 1.2  # at LEAST_PEAK, ITU-R BT.2100-2
_STRIP = 1 << 18  # pixels treated at once: bounds memory for 8K and stays in the processor's cache

_LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)  # BT.2100-2
_LUMINANCE_709 = np.array([0.2126, 0.7152, 0.0722], np.float32)
_XY = {  # red, green, blue; all with white D65
    "BT.2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # SMPTE EG 432-1
    "BT.709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_GAINS = 1 << 14  # entries of the table of the brightness curve


@dataclass(frozen=True)
class Light:
    """What a file's code values mean where they are not plain BT.709."""

    transfer: Transfer
    primaries: Primaries
    peak: float = LEAST_PEAK  # cd/m2, the brightest the file says it holds; PQ only


def tone_map(picture: np.ndarray, light: Light) -> np.ndarray:
    """uint16 R'G'B' [height, width, 3], full range, as `light` says -> uint8 R'G'B' [height, width, 3], BT.709 for BT.1886."""
    assert picture.dtype == np.uint16 and picture.ndim == 3 and picture.shape[2] == 3, (picture.dtype, picture.shape)  # noqa: PT018
    flat = picture.reshape(-1, 3)
    out = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), _STRIP):
        strip = slice(start, start + _STRIP)
        # Colour planes: NumPy takes eight times as long for pixels of three values each.
        shown = _fitted(_darkened(np.ascontiguousarray(flat[strip].T), light), light.primaries)
        out[strip] = _signals()[_codes(shown)].T
    return out.reshape(picture.shape)


def pq_light(signal: np.ndarray) -> np.ndarray:
    """PQ signal in [0, 1] -> cd/m2 (SMPTE ST 2084 EOTF)."""
    m1, m2, c1, c2, c3 = _PQ
    power = np.asarray(signal, np.float64) ** (1 / m2)
    return _PQ_PEAK * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def pq_signal(light: np.ndarray) -> np.ndarray:
    """cd/m2 in [0, 10000] -> PQ signal in [0, 1] (SMPTE ST 2084 inverse EOTF)."""
    m1, m2, c1, c2, c3 = _PQ
    power = (np.asarray(light, np.float64) / _PQ_PEAK) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


_PQ = (2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32)


def hlg_scene_light(signal: np.ndarray) -> np.ndarray:
    """HLG signal in [0, 1] -> scene light in [0, 1], per channel (BT.2100-2, inverse OETF)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.asarray(signal, np.float64)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def darker(light: np.ndarray, peak: float) -> np.ndarray:
    """The EETF: cd/m2 on a display of `peak` -> cd/m2 on one of `REFERENCE_WHITE`; monotone, the identity in the dark."""
    brightest = float(pq_signal(np.array(peak)))
    given = np.minimum(pq_signal(light) / brightest, 1.0)
    highest = float(pq_signal(np.array(REFERENCE_WHITE))) / brightest
    knee = 1.5 * highest - 0.5
    t = np.maximum(given - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * highest
    return pq_light(np.where(given < knee, given, spline) * brightest)


def to_709(primaries: Primaries) -> np.ndarray:
    """float64 [3, 3]: linear RGB of `primaries` (columns) -> linear RGB of BT.709."""
    return np.linalg.solve(_to_xyz("BT.709"), _to_xyz(primaries))


def _to_xyz(primaries: Primaries) -> np.ndarray:
    corners = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*_XY[primaries], _D65)]).T
    return corners[:, :3] * np.linalg.solve(corners[:, :3], corners[:, 3])


@cache
def _lights(transfer: Transfer) -> np.ndarray:
    """Code value -> light, 1 for reference white; for HLG of the scene, else of the display."""
    signal = np.arange(1 << 16) / 65535
    if transfer == "PQ":
        return (pq_light(signal) / REFERENCE_WHITE).astype(np.float32)
    return (hlg_scene_light(signal) if transfer == "HLG" else signal**_DISPLAY_GAMMA).astype(np.float32)


@cache
def _gains(peak: float) -> np.ndarray:
    """What to multiply with, by the fourth root of the largest channel: evenly spaced for the eye, and cheap to compute."""
    light = (np.arange(_GAINS + 1) / (_GAINS - 1)) ** 4 * _PQ_PEAK  # one beyond the last, to interpolate towards
    light[0] = light[1]  # black times anything is black
    return (darker(np.minimum(light, _PQ_PEAK), peak) / light).astype(np.float32)


@cache
def _signals() -> np.ndarray:
    """uint8 signal, by the square root of the light as 16 bits."""
    return np.rint(255 * (np.arange(1 << 16) / 65535) ** (2 / _DISPLAY_GAMMA)).astype(np.uint8)


def _codes(light: np.ndarray) -> np.ndarray:
    return (np.sqrt(light) * np.float32(65535) + np.float32(0.5)).astype(np.uint16)


def _darkened(codes: np.ndarray, light: Light) -> np.ndarray:
    """float32 [3, pixels]: light in the file's own primaries, 1 for SDR's white, no channel above."""
    linear = _lights(light.transfer)[codes]
    if light.transfer == "SDR":
        return linear
    if light.transfer == "HLG":
        linear *= (_LUMINANCE_2020 @ linear) ** np.float32(_HLG_GAMMA - 1) * np.float32(LEAST_PEAK / REFERENCE_WHITE)
    place = np.sqrt(np.sqrt(linear.max(0) * np.float32(REFERENCE_WHITE / _PQ_PEAK))) * np.float32(_GAINS - 1)
    gains, left = _gains(max(light.peak, LEAST_PEAK)), place.astype(np.int32)
    at_left = gains[left]  # interpolated: the nearest entry alone would let a brighter grey come out a level darker
    linear *= at_left + (gains[left + 1] - at_left) * (place - left)
    return linear


def _fitted(linear: np.ndarray, primaries: Primaries) -> np.ndarray:
    """float32 [3, pixels] of BT.709 in [0, 1]."""
    linear = to_709(primaries).astype(np.float32) @ linear
    lowest, highest = linear.min(0), linear.max(0)
    outside = np.flatnonzero((lowest < 0) | (highest > 1))
    if len(outside):
        colour, low, high = linear[:, outside], lowest[outside], highest[outside]
        grey = np.clip(_LUMINANCE_709 @ colour, 0, 1)
        below = np.divide(grey, grey - low, out=np.ones_like(grey), where=low < 0)
        above = np.divide(1 - grey, high - grey, out=np.ones_like(grey), where=high > 1)
        linear[:, outside] = grey + np.minimum(below, above) * (colour - grey)
    return np.clip(linear, 0, 1, out=linear)
