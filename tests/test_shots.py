"""Shots: cuts exact to the frame, no fade or dissolve inside a shot; measured on drawn footage and a filmed clip."""

from itertools import pairwise

import numpy as np
import pytest
from real_clips import packaged_clip
from scenes import black, dissolve, faded, scene, title, write

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.shots import Shot, find_borders, find_shots, runs
from mochi_lora.curation.survey import Survey, survey_source
from mochi_lora.data.probe import probe

SETTINGS = SplitConfig()


def survey(path) -> Survey:
    return survey_source(probe(path), SETTINGS, lambda frames: None)


def shots_of(path) -> list[Shot]:
    return find_shots(survey(path), SETTINGS.black)[0]


@pytest.mark.parametrize("rate", ["24", "25", "30000/1001", "30", "50", "60"])
def test_hard_cuts_are_exact_at_every_rate(tmp_path, rate):
    lengths = [31, 17, 52, 40]
    film = np.concatenate([scene(seed, length) for seed, length in enumerate(lengths)])
    edges = np.cumsum([0, *lengths])
    found = shots_of(write(tmp_path / "film.mp4", film, rate=rate))
    assert found == [Shot(int(first), int(stop)) for first, stop in pairwise(edges)]


def test_cuts_in_footage_of_uneven_rate_are_exact(tmp_path):
    """Every third frame dropped by its time stamp, in Matroska, which keeps the gaps."""
    film = np.concatenate([scene(1, 40), scene(2, 40)])
    uneven = ("-vf", "select='mod(n,3)',setpts=PTS", "-fps_mode", "passthrough", "-c:v", "libx264", "-preset", "ultrafast")
    path = write(tmp_path / "film.mkv", film, codec=(*uneven, "-pix_fmt", "yuv420p"))
    found = survey(path)
    assert len(set(np.diff(found.times).round(3).tolist())) == 2
    (cut,) = found.cuts
    assert found.times[cut] == pytest.approx((40 - 1) / 24, abs=1.5 / 24)
    assert found.times.tolist() == pytest.approx(list(probe(path).times), abs=1e-9)


def test_fast_movement_is_no_cut(tmp_path):
    assert shots_of(write(tmp_path / "film.mp4", scene(3, 60, speed=14.0))) == [Shot(0, 60)]


@pytest.mark.parametrize("length", [8, 12, 24, 36])
def test_no_frame_of_a_dissolve_is_in_a_shot(tmp_path, length):
    film = dissolve(scene(1, 60), scene(2, 60), length)
    (before, after) = shots_of(write(tmp_path / "film.mp4", film))
    mixed = range(60 - length, 60)
    assert before.first == 0
    assert after.stop == len(film)
    assert mixed[0] - 6 - 3 <= before.stop <= mixed[0] + 1  # the first and last mix are all but pure
    assert mixed[-1] <= after.first <= mixed[-1] + 1 + 6 + 3


def test_a_light_that_changes_for_longer_than_any_dissolve_is_part_of_its_shot(tmp_path):
    gain = np.linspace(0.2, 1.2, 96)[:, None, None, None]
    assert shots_of(write(tmp_path / "film.mp4", (scene(1, 96, speed=0.5) * gain).clip(0, 255).astype(np.uint8))) == [
        Shot(0, 96)
    ]


def test_a_dissolve_of_two_seconds_is_one_and_a_fade_to_black_is_one_however_long(tmp_path):
    assert len(shots_of(write(tmp_path / "mixed.mp4", dissolve(scene(1, 90), scene(2, 90), 48)))) == 2
    (shot,) = shots_of(write(tmp_path / "faded.mp4", faded(scene(1, 120), out=72)))
    assert shot.first == 0
    assert shot.stop <= 50


def test_a_fade_through_black_is_one_border_named_by_its_black(tmp_path):
    film = np.concatenate([faded(scene(1, 60), out=14), black(3), faded(scene(2, 60), into=14)])
    found = survey(write(tmp_path / "film.mp4", film))
    (border,) = find_borders(found, SETTINGS.black)
    assert border.first <= 47
    assert border.stop >= 76
    assert 59 <= border.at <= 64
    assert not border.hard


def test_a_long_black_stretch_is_a_shot_of_its_own_for_the_filter_to_name(tmp_path):
    film = np.concatenate([scene(1, 40), black(40), scene(2, 40)])
    assert shots_of(write(tmp_path / "film.mp4", film)) == [Shot(0, 40), Shot(40, 80), Shot(80, 120)]


def test_a_title_on_black_is_no_black(tmp_path):
    found = survey(write(tmp_path / "film.mp4", np.concatenate([scene(1, 40), title(12), scene(2, 40)])))
    assert find_shots(found, SETTINGS.black)[0] == [Shot(0, 40), Shot(40, 52), Shot(52, 92)]


def test_a_filmed_street_splits_at_its_five_cuts():
    """Seen frame by frame: the camera changes at these frames and nowhere else."""
    _, borders = find_shots(survey(packaged_clip("bikes")), SETTINGS.black)
    assert [border.at for border in borders] == [30, 76, 137, 187, 242]


def test_one_filmed_take_is_one_shot():
    for name in ("bigbuckbunny", "carphone_pristine"):
        assert len(shots_of(packaged_clip(name))) == 1


def test_runs_of_marks():
    marks = np.array([True, False, True, True, False, False, True])
    assert runs(marks) == [(0, 1), (2, 4), (6, 7)]
    assert runs(np.zeros(3, bool)) == []
