"""The one pass over a source: what each number says, and that a kept survey is this file's, whole."""

import os
import shutil

import cv2
import numpy as np
import pytest
from footage import run_ffmpeg
from real_clips import packaged_clip
from scenes import scene, write

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.frame_measures import FrameMeasures, picture_hash
from mochi_lora.curation.survey import load_survey, save_survey, survey_key, survey_source
from mochi_lora.data.probe import probe
from mochi_lora.errors import ClipError

SETTINGS = SplitConfig()


def survey(path):
    return survey_source(probe(path), SETTINGS, lambda frames: None)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", scene(1, 50))


@pytest.fixture(scope="module")
def surveyed(clip):
    return survey(clip)


def bits(one: int, other: int) -> int:
    return (int(one) ^ int(other)).bit_count()


def test_every_frame_is_measured_once_at_its_time(clip, surveyed):
    assert surveyed.times.tolist() == pytest.approx(list(probe(clip).times), abs=1e-9)
    per_frame = (surveyed.luma, surveyed.contrast, surveyed.change, surveyed.swing, surveyed.spread, surveyed.hashes)
    assert {len(values) for values in per_frame} == {50}
    assert surveyed.looks.tolist() == list(range(3, 50, 6))
    assert surveyed.lit_rows.shape == (8, 180)
    assert (surveyed.width, surveyed.height) == (320, 180)


def test_progress_adds_up_to_the_frames(clip):
    told = []
    survey_source(probe(clip), SETTINGS, told.append)
    assert sum(told) == 50


def test_motion_is_told_in_percent_of_the_short_side_per_eighth_of_a_second(tmp_path):
    """Two pixels a frame, 24 frames a second, 180 pixels high: 3.3 %; the same at 48 frames a second is twice that."""
    for rate, expected in (("24", 3.33), ("48", 6.67)):
        found = survey(write(tmp_path / f"{rate}.mp4", scene(1, 60, detail=24), rate=rate))
        assert np.median(found.motion) == pytest.approx(expected, rel=0.15)
    assert np.median(survey(write(tmp_path / "still.mp4", scene(1, 30, speed=0))).motion) < 0.05


def test_luma_and_change_are_of_255(tmp_path):
    flat = np.concatenate([np.full((20, 180, 320, 3), 60, np.uint8), np.full((20, 180, 320, 3), 200, np.uint8)])
    found = survey(write(tmp_path / "flat.mp4", flat))
    assert found.luma[[0, 39]] == pytest.approx([60, 200], abs=2.5)  # swscale rounds down
    assert found.change[20] == pytest.approx(140, abs=3)
    assert found.contrast.max() < 1


def test_blur_lowers_sharpness(tmp_path):
    sharp = scene(1, 20, detail=3)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 4) for frame in sharp])
    of = [np.median(survey(write(tmp_path / f"{name}.mp4", film)).sharpness) for name, film in (("s", sharp), ("b", blurred))]
    assert of[1] < 0.1 * of[0]


def test_an_alternating_light_swings_by_its_amplitude_and_movement_does_not(tmp_path):
    film = scene(1, 40, speed=6.0).astype(float)
    steady = survey(write(tmp_path / "steady.mp4", film.astype(np.uint8)))
    light = np.where(np.arange(40) % 2, 0.94, 1.06)[:, None, None, None]
    lit = survey(write(tmp_path / "lit.mp4", (film * light).clip(0, 255).astype(np.uint8)))
    amplitude = 0.06 * steady.luma.mean()
    assert lit.swing[1:-1].mean() == pytest.approx(amplitude, rel=0.25)
    assert steady.swing[1:-1].mean() < 0.15 * amplitude


def test_a_steady_brightening_is_no_swing(tmp_path):
    film = scene(1, 40, speed=0).astype(float) * np.linspace(0.5, 1.0, 40)[:, None, None, None]
    assert survey(write(tmp_path / "film.mp4", film.astype(np.uint8))).swing.mean() < 0.5


def test_hashes_survive_scaling_and_compression_and_tell_scenes_apart():
    good, bad = survey(packaged_clip("carphone_pristine")), survey(packaged_clip("carphone_distorted"))
    assert np.mean([bits(*pair) for pair in zip(good.hashes, bad.hashes, strict=True)]) < 6
    one, other = (cv2.cvtColor(scene(seed, 1)[0], cv2.COLOR_RGB2GRAY) for seed in (1, 2))
    assert bits(picture_hash(one), picture_hash(other)) > 16
    assert bits(picture_hash(one), picture_hash(cv2.resize(one, (97, 61)))) < 5


def test_a_turned_file_is_surveyed_as_shown(tmp_path, clip):
    turned = tmp_path / "turned.mov"
    run_ffmpeg("-display_rotation", "90", "-i", clip, "-c", "copy", turned)
    found = survey(turned)
    assert (found.width, found.height) == (180, 320)
    assert found.lit_rows.shape[1] > found.lit_columns.shape[1]


def test_a_survey_comes_back_as_it_was_kept(tmp_path, surveyed):
    path = tmp_path / "kept.safetensors"
    save_survey(path, surveyed)
    back = load_survey(path)
    for name, kept in vars(surveyed).items():
        assert np.array_equal(getattr(back, name), kept), name


def test_half_a_survey_is_none(tmp_path, surveyed):
    path = tmp_path / "kept.safetensors"
    assert load_survey(path) is None
    save_survey(path, surveyed)
    path.write_bytes(path.read_bytes()[:-100])
    assert load_survey(path) is None
    path.write_bytes(b"")
    assert load_survey(path) is None


def test_the_key_follows_the_content_and_what_shapes_the_survey_and_not_the_name(tmp_path, clip):
    key = survey_key(clip, SETTINGS)
    moved = tmp_path / "other name.mp4"
    shutil.copy2(clip, moved)
    assert survey_key(moved, SETTINGS) == key
    assert survey_key(clip, SplitConfig(margin=1.0, mode="head")) == key
    assert survey_key(clip, SplitConfig(cut_ratio=4.0)) != key
    content = bytearray(moved.read_bytes())
    content[len(content) // 2] ^= 1
    stamp = moved.stat().st_mtime_ns
    moved.write_bytes(bytes(content))
    os.utime(moved, ns=(stamp, stamp))
    assert survey_key(moved, SETTINGS) != key


def test_a_damaged_middle_names_the_file_or_gives_fewer_frames(tmp_path, clip):
    """Decoders conceal what they can; what they cannot is this file's failure, not everybody's."""
    for seed in range(8):
        content = bytearray(clip.read_bytes())
        chance = np.random.default_rng(seed)
        for place in chance.integers(len(content) // 10, len(content) * 3 // 4, 40):
            content[place] = int(chance.integers(256))
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(bytes(content))
        try:
            assert 0 < len(survey(broken).times) <= 50
        except ClipError as error:
            assert "broken.mp4" in str(error)  # noqa: PT017


def test_hdr_footage_is_measured_as_it_is_shown(tmp_path):
    """Code value 0.58 of PQ is reference white, which SDR shows at 0.9; read as SDR it would be mid grey."""
    picture = np.full((12, 96, 160, 3), round(0.58 * 255), np.uint8)
    hdr = ("-vf", "scale=out_color_matrix=bt2020nc:out_range=tv", "-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-preset")
    tags = ("colorprim=bt2020", "transfer=smpte2084", "colormatrix=bt2020nc", "log-level=none")
    path = write(tmp_path / "hdr.mp4", picture, codec=(*hdr, "ultrafast", "-x265-params", ":".join(tags)))
    assert survey(path).luma[5] / 255 == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("size", [(256, 14), (1920, 32), (14, 256), (8, 8)])
def test_a_picture_too_narrow_to_be_measured_is_refused_by_name(tmp_path, size):
    """OpenCV's flow raises on some of these and reads beyond its memory on others (a crash at 256 x 15)."""
    path = write(tmp_path / "narrow.mp4", scene(1, 12, size=size, detail=4))
    with pytest.raises(ClipError, match=rf"narrow\.mp4: a picture of {size[0]}x{size[1]} pixels is too small or too narrow"):
        survey(path)


@pytest.mark.parametrize("size", [(16, 16), (512, 16), (46, 18)])
def test_the_narrowest_pictures_that_are_not_refused_are_measured(tmp_path, size):
    found = survey(write(tmp_path / "narrow.mp4", scene(1, 24, size=size, detail=4)))
    assert len(found.motion) == 4
    assert np.isfinite(found.motion).all()


def test_what_opencv_raises_is_this_files_failure(clip, monkeypatch):
    def fail(*_):
        raise cv2.error("OpenCV(5.0.0) flow.cpp:1: error: (-215:Assertion failed) too small")

    monkeypatch.setattr(FrameMeasures, "look", fail)
    with pytest.raises(ClipError, match=r"clip\.mp4: its pictures cannot be measured \(.*too small"):
        survey(clip)
