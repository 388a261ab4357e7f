"""HDR to SDR: known light comes out where the standards say, grey stays grey, colours keep their hue."""

import numpy as np
import pytest
import torch
from footage import hdr, make_patches

from mochi_lora.data.decode import read_clip
from mochi_lora.data.probe import probe
from mochi_lora.data.sources import ClipSource
from mochi_lora.data.tone_map import (
    REFERENCE_WHITE,
    Light,
    darker,
    hlg_scene_light,
    pq_light,
    pq_signal,
    to_709,
    tone_map,
)
from mochi_lora.spec import Bucket

PQ, HLG = Light("PQ", "BT.2020"), Light("HLG", "BT.2020")
NITS = np.array([0.1, 1, 5, 20, 50, 80, 203, 400, 1000])
# BT.2020 colours in linear light, 1 for reference white: skin, foliage and sky lie in BT.709, the rest far outside.
NEAR = np.array([[0.42, 0.27, 0.19], [0.08, 0.11, 0.04], [0.30, 0.38, 0.55]])
FAR = np.array([[0.5, 0, 0], [0, 0.5, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.6, 0.25, 0]])


def _codes(signals: np.ndarray) -> np.ndarray:
    return np.rint(signals * 65535).astype(np.uint16).reshape(1, -1, 3)


def _greys(signals: np.ndarray) -> np.ndarray:
    return np.repeat(np.atleast_1d(signals)[:, None], 3, 1)


def _shown_light(rgb: np.ndarray) -> np.ndarray:
    """Linear light of an SDR signal on a BT.1886 display, 1 for white."""
    return (rgb / 255.0) ** 2.4


def _hue(rgb709: np.ndarray) -> np.ndarray:
    """Degrees, in Oklab (Ottosson 2020)."""
    to_lms = [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
    lms = np.cbrt(rgb709 @ np.array(to_lms).T)
    a = lms @ [1.9779984951, -2.4285922050, 0.4505937099]
    b = lms @ [0.0259040371, 0.7827717662, -0.8086757660]
    return np.degrees(np.arctan2(b, a))


def test_the_transfer_functions_are_those_of_the_standards():
    """ST 2084: 100 cd/m2 at 0.5081; BT.2408: reference white at 58 % PQ and 75 % HLG (a 1000 cd/m2 display, gamma 1.2)."""
    assert pq_signal(np.array([0, 100, 203, 10000])) == pytest.approx([7.3e-7, 0.5081, 0.5807, 1.0], abs=1e-4)
    np.testing.assert_allclose(pq_light(pq_signal(NITS)), NITS, rtol=1e-9)
    assert hlg_scene_light(np.array([0, 0.5, 1])) == pytest.approx([0, 1 / 12, 1], abs=1e-6)
    assert 1000 * hlg_scene_light(np.array(0.75)) ** 1.2 == pytest.approx(REFERENCE_WHITE, abs=1)


def test_the_brightness_curve_is_the_identity_in_the_dark_and_ends_at_white():
    light = pq_light(np.linspace(0, pq_signal(np.array(1000.0)), 500))
    mapped = darker(light, 1000)
    assert (np.diff(mapped) > 0).all()
    np.testing.assert_allclose(mapped[light < 88], light[light < 88], atol=1e-6)
    assert mapped[-1] == pytest.approx(REFERENCE_WHITE)
    assert darker(np.array(REFERENCE_WHITE), 1000) == pytest.approx(159.0, abs=0.5)
    assert darker(np.array(4000.0), 4000) == pytest.approx(REFERENCE_WHITE)
    assert darker(np.array(5000.0), 1000) == pytest.approx(REFERENCE_WHITE)  # brighter than the file said


def test_bt2020_to_bt709_is_the_published_matrix():
    """ITU-R BT.2087-0, inverse of its matrix M2."""
    published = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    np.testing.assert_allclose(to_709("BT.2020"), published, atol=1e-4)
    np.testing.assert_allclose(to_709("BT.709"), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(to_709("P3").sum(1), 1, atol=1e-12)  # white stays white


@pytest.mark.parametrize("light", [PQ, HLG, Light("SDR", "BT.2020"), Light("PQ", "P3", 4000.0), Light("PQ", "BT.709")])
def test_greys_stay_grey_and_never_change_places(light):
    ramp = np.arange(0, 65536, 16, dtype=np.uint16)
    shown = tone_map(_greys(ramp).reshape(1, -1, 3), light)[0].astype(int)
    assert np.ptp(shown, axis=1).max() == 0
    assert (np.diff(shown[:, 0]) >= 0).all()
    assert (shown[0, 0], shown[-1, 0]) == (0, 255)
    if light.transfer != "SDR":  # mid tones are not clipped: nothing below reference white comes near full signal
        below = ramp / 65535 <= (0.58 if light.transfer == "PQ" else 0.75)
        assert shown[below, 0].max() <= 231


def test_pq_and_hlg_of_the_same_light_look_the_same():
    """What a 1000 cd/m2 display shows alike is shown alike."""
    signals = np.linspace(0.05, 1, 40)
    nits = 1000 * hlg_scene_light(signals) ** 1.2
    by_hlg, by_pq = tone_map(_codes(_greys(signals)), HLG), tone_map(_codes(_greys(pq_signal(nits))), PQ)
    assert np.abs(by_hlg.astype(int) - by_pq).max() <= 1


def test_sdr_of_wide_gamut_keeps_its_greys_and_its_colours_light():
    greys = _codes(_greys(np.arange(256) / 255))
    assert (tone_map(greys, Light("SDR", "BT.2020"))[0, :, 0] == np.arange(256)).all()
    shown = _shown_light(tone_map(_codes(NEAR ** (1 / 2.4)), Light("SDR", "BT.2020"))[0])
    np.testing.assert_allclose(shown, NEAR @ to_709("BT.2020").T, atol=0.01)


def test_colours_bt709_can_show_keep_their_chromaticity():
    shown = _shown_light(tone_map(_codes(pq_signal(NEAR * REFERENCE_WHITE)), PQ)[0])
    expected = NEAR @ to_709("BT.2020").T
    np.testing.assert_allclose(shown / shown.sum(1, keepdims=True), expected / expected.sum(1, keepdims=True), atol=0.01)


def test_colours_bt709_lacks_keep_hue_and_luminance():
    """Cutting channels off instead turns this orange by 6 and this green by 11 degrees."""
    wanted = FAR @ to_709("BT.2020").T
    shown = _shown_light(tone_map(_codes(pq_signal(FAR * 100)), PQ)[0]) * REFERENCE_WHITE / 100
    assert (np.abs((_hue(shown) - _hue(wanted) + 180) % 360 - 180) < 5).all()
    luminance = np.array([0.2126, 0.7152, 0.0722])
    np.testing.assert_allclose(shown @ luminance, wanted @ luminance, rtol=0.03)
    clipped = np.abs((_hue(np.clip(wanted, 0, 1)) - _hue(wanted) + 180) % 360 - 180)
    assert clipped.max() > 8


def test_bright_saturated_light_is_not_cut_off():
    """A red lamp at 100, 300 and 900 cd/m2 stays three reds, ever brighter."""
    lamp = np.array([[1, 0.15, 0.1]]) * [[100], [300], [900]]
    shown = _shown_light(tone_map(_codes(pq_signal(lamp)), PQ)[0])
    assert (np.diff(shown @ [0.2126, 0.7152, 0.0722]) > 0.02).all()
    assert np.ptp(_hue(shown)) < 8
    assert (shown.max(1) > 2 * shown.min(1)).all()


def test_many_pixels_are_treated_as_few():
    """Strips: the picture is larger than one."""
    picture = np.random.default_rng(0).integers(0, 65536, (600, 500, 3)).astype(np.uint16)
    whole = tone_map(picture, PQ)
    assert (whole[550:, :7] == tone_map(np.ascontiguousarray(picture[550:, :7]), PQ)).all()


def _read(path, signals: np.ndarray) -> np.ndarray:
    """uint8 levels [patches, 3] of the middle of each patch, through all of the clip reader."""
    info = probe(path)
    bucket = Bucket(7, 64, 64 * len(signals))
    clip = read_clip(ClipSource(path, "patches"), info, bucket)
    assert torch.equal(clip[:, 0], clip[:, 6]) or (clip[:, 0] - clip[:, 6]).abs().max() < 0.03  # no flicker
    return ((clip[:, 3, 32, 32::64].T + 1) * 127.5).round().numpy()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_an_hdr10_clip_is_read_with_its_light_where_it_belongs(tmp_path, name):
    signals = _greys(pq_signal(NITS))
    said = "hdr10=1:repeat-headers=1:max-cll=1000,400"
    shown = _read(make_patches(tmp_path / name, signals, hdr("smpte2084", said)), signals)
    expected = 255 * (darker(NITS, 1000) / REFERENCE_WHITE) ** (1 / 2.4)
    assert np.abs(shown - expected[:, None]).max() <= 2, shown
    assert np.ptp(shown, axis=1).max() <= 2  # grey
    white = shown[list(NITS).index(203)]
    assert (np.abs(white - 230) <= 2).all()


def test_an_hlg_clip_is_read_with_its_light_where_it_belongs(tmp_path):
    signals = _greys(np.array([0.1, 0.25, 0.5, 0.75, 1.0]))
    shown = _read(make_patches(tmp_path / "a.mov", signals, hdr("arib-std-b67")), signals)
    nits = 1000 * hlg_scene_light(signals) ** 1.2
    assert np.abs(shown - 255 * (darker(nits, 1000) / REFERENCE_WHITE) ** (1 / 2.4)).max() <= 2


def test_colours_of_an_hdr10_clip_come_through_coding_and_conversion(tmp_path):
    """The matrix of BT.2020 is used, not that of BT.601 or BT.709: patches differ by far more otherwise."""
    colours = np.concatenate([NEAR, FAR]) * 100
    signals = pq_signal(colours)
    shown = _read(make_patches(tmp_path / "a.mp4", signals, hdr("smpte2084")), signals)
    assert np.abs(shown - tone_map(_codes(signals), PQ)[0]).max() <= 4


def test_wide_gamut_sdr_is_read_as_bt709(tmp_path):
    signals = np.concatenate([NEAR ** (1 / 2.4), _greys(np.array([0.2, 0.5, 1.0]))])
    clip = make_patches(tmp_path / "a.mp4", signals, hdr("bt2020-10", "hdr10=0"))
    assert probe(clip).light == Light("SDR", "BT.2020")
    assert np.abs(_read(clip, signals) - tone_map(_codes(signals), Light("SDR", "BT.2020"))[0]).max() <= 3
