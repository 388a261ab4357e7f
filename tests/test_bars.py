"""Bars that stand throughout a source are no part of what is measured; the crop that takes them off is as it was."""

import numpy as np
import pytest
from scenes import faded, scene, write

from mochi_lora.config.curation import FilterConfig, SplitConfig
from mochi_lora.curation import survey as survey_module
from mochi_lora.curation.bars import alike
from mochi_lora.curation.filters import filter_clips
from mochi_lora.curation.glimpse import glimpsed_bars
from mochi_lora.curation.split import split_source
from mochi_lora.curation.survey import survey_source
from mochi_lora.data.probe import probe

SPLIT = SplitConfig(mode="middle", frames=19)
PILLARS, LETTERS = ((224, 128), (72, 128)), ((320, 180), (320, 134))  # frame and picture in it, (width, height) each
BOXES = pytest.mark.parametrize("box", [PILLARS, LETTERS], ids=["pillars", "letters"])


def survey(path):
    return survey_source(probe(path), SPLIT, lambda frames: None)


def whole_survey(path, monkeypatch):
    """As if no source had bars."""
    with monkeypatch.context() as patch:
        patch.setattr(survey_module, "_measurable", lambda bars, info: None)
        return survey(path)


def boxed(film: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
    _, height, width, _ = film.shape
    side, top = (frame[0] - width) // 2, (frame[1] - height) // 2
    return np.pad(film, ((0, 0), (top, frame[1] - height - top), (side, frame[0] - width - side), (0, 0)))


def clips_of(path):
    return split_source(path, survey(path), SPLIT, path.parent)[0]


def refusals(*paths):
    clips = [clip for path in paths for clip in clips_of(path)]
    return [clip.refused for clip in filter_clips(clips, FilterConfig()).clips]


def same(one, other) -> list[str]:
    """Names of what differs."""
    return [name for name, value in vars(one).items() if not np.array_equal(value, getattr(other, name))]


def dim(film: np.ndarray) -> np.ndarray:
    return (film * 0.55).astype(np.uint8)


@BOXES
def test_bars_change_next_to_nothing_that_is_measured(tmp_path, box):
    frame, size = box
    film = dim(np.concatenate([scene(seed, 40, size=size, detail=6, speed=1) for seed in (1, 2)]))
    plain = survey(write(tmp_path / "plain.mp4", film))
    inside = survey(write(tmp_path / "boxed.mp4", boxed(film, frame)))
    assert (inside.width, inside.height) == frame
    for name, rel in (("luma", 0.03), ("contrast", 0.06), ("change", 0.1), ("sharpness", 0.2), ("motion", 0.15)):
        measured = [float(np.median(getattr(one, name))) for one in (plain, inside)]
        assert measured[1] == pytest.approx(measured[0], rel=rel), name
    bits = np.bitwise_count(plain.hashes ^ inside.hashes)
    assert bits.mean() < 3  # of 64


@BOXES
def test_a_cut_between_bars_is_found_at_its_frame(tmp_path, box):
    """Of a change that is only just a cut, the black around the picture would take what makes it one."""
    frame, size = box
    first, second = (scene(seed, 20, size=size, detail=20, speed=1) for seed in (7, 8))
    film = dim(np.concatenate([first, second]))
    for name, made in (("plain", film), ("boxed", boxed(film, frame))):
        assert survey(write(tmp_path / f"{name}.mp4", made)).cuts.tolist() == [20], name


@BOXES
def test_a_dim_picture_in_bars_is_not_refused_as_too_dark(tmp_path, box):
    frame, size = box
    film = (scene(1, 40, size=size, detail=5, speed=1) * 0.45).astype(np.uint8)
    assert refusals(write(tmp_path / "boxed.mp4", boxed(film, frame))) == [None]


@BOXES
def test_flicker_between_bars_is_refused(tmp_path, box):
    frame, size = box
    light = np.where(np.arange(40) % 2, 0.93, 1.0)[:, None, None, None]
    film = (scene(1, 40, size=size, detail=5, speed=1) * light).astype(np.uint8)
    for name, made in (("plain", film), ("boxed", boxed(film, frame))):
        (refused,) = refusals(write(tmp_path / f"{name}.mp4", made))
        assert refused is not None, name
        assert refused.startswith("flicker: "), name


@BOXES
def test_a_copy_with_bars_is_a_duplicate(tmp_path, box):
    frame, size = box
    film = scene(5, 40, size=size, detail=8, speed=1)
    paths = write(tmp_path / "plain.mp4", film), write(tmp_path / "boxed.mp4", boxed(film, frame))
    assert [refused and refused.split(":")[0] for refused in refusals(*paths)] == ["duplicate", None]


@BOXES
def test_the_crop_offered_is_that_of_the_whole_picture_as_before(tmp_path, monkeypatch, box):
    path = write(tmp_path / "boxed.mp4", boxed(scene(1, 40, size=box[1], detail=6), box[0]))
    now, before = survey(path), whole_survey(path, monkeypatch)
    assert {"luma", "sharpness"} <= set(same(now, before))
    assert not {"lit_rows", "lit_columns", "looks", "times"} & set(same(now, before))
    assert now.bars(0, 40) == before.bars(0, 40)
    (clip,) = clips_of(path)
    assert clip.measures.bars == before.bars(0, 40)
    assert (clip.measures.width, clip.measures.height) == box[0]


def test_wider_bars_of_one_shot_are_cropped_off_it_and_stand_nowhere_else(tmp_path):
    """2.39:1 in pillars beside a shot that fills the height between them: the pillars stand throughout, the rest does not."""
    film = scene(1, 80, size=(240, 180), detail=6)
    film[40:, :24], film[40:, -24:] = 0, 0
    found = survey(write(tmp_path / "film.mp4", boxed(film, (320, 180))))
    assert alike(found.bars(0, 40), (40, 0, 280, 180), 320, 180)
    assert alike(found.bars(40, 80), (40, 24, 280, 156), 320, 180)
    assert found.luma[60] / found.luma[20] == pytest.approx(132 / 180, rel=0.05)


@pytest.mark.parametrize("first", ["plain", "boxed"])
def test_bars_in_a_part_of_a_video_change_nothing(tmp_path, monkeypatch, first):
    parts = {"plain": scene(1, 40, detail=6), "boxed": boxed(scene(2, 40, size=(320, 134), detail=6), (320, 180))}
    film = np.concatenate([parts.pop(first), *parts.values()])
    path = write(tmp_path / "film.mp4", film)
    assert same(survey(path), whole_survey(path, monkeypatch)) == []


def test_a_key_frame_in_black_does_not_hide_the_bars(tmp_path):
    """Two seconds that fade in, in one group of pictures: only the whole pass sees that there is anything inside bars."""
    film = boxed(faded(scene(1, 48, size=(72, 128), detail=6, speed=1), into=8), (224, 128))
    path = write(tmp_path / "film.mp4", film)
    assert glimpsed_bars(probe(path), (224, 128)) is None
    plain = survey(write(tmp_path / "plain.mp4", film[:, :, 76:148]))
    assert survey(path).luma[20:] == pytest.approx(plain.luma[20:], rel=0.03)


def test_the_last_word_is_every_look_and_not_the_key_frames(tmp_path, monkeypatch):
    path = write(tmp_path / "film.mp4", scene(1, 40, detail=6))
    before = whole_survey(path, monkeypatch)
    monkeypatch.setattr(survey_module, "glimpsed_bars", lambda info, size: (0, 24, 320, 156))
    told = []
    assert same(survey_source(probe(path), SPLIT, told.append), before) == []
    assert sum(told) == 40  # a second pass is no more frames


def test_a_source_with_bars_is_decoded_once(tmp_path, monkeypatch):
    passes = []
    measured = survey_module._measured
    monkeypatch.setattr(survey_module, "_measured", lambda *args: passes.append(args[1]) or measured(*args))
    survey(write(tmp_path / "boxed.mp4", boxed(scene(1, 40, size=(72, 128), detail=6), (224, 128))))
    assert len(passes) == 1
    assert alike(passes[0], (76, 0, 148, 128), 224, 128)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_key_frames_are_glimpsed_in_every_container(tmp_path, suffix):
    film = boxed(scene(1, 200, size=(72, 128), detail=6, speed=0.5), (224, 128))
    info = probe(write(tmp_path / f"film.{suffix}", film))
    assert alike(glimpsed_bars(info, (224, 128)), (76, 0, 148, 128), 224, 128)


def test_what_cannot_be_read_has_no_bars_to_glimpse(tmp_path):
    path = write(tmp_path / "film.mp4", boxed(scene(1, 20, size=(72, 128)), (224, 128)))
    info = probe(path)
    path.write_bytes(b"no video")
    assert glimpsed_bars(info, (224, 128)) is None


def test_a_slit_too_narrow_to_be_measured_is_measured_with_its_bars(tmp_path, monkeypatch):
    path = write(tmp_path / "slit.mp4", boxed(scene(1, 20, size=(8, 64), detail=4), (48, 64)))
    assert survey(path).bars(0, 20) is not None
    assert same(survey(path), whole_survey(path, monkeypatch)) == []
