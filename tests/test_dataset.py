"""Drawn data sets: the clips show what their captions say, nothing held out is among them, a folder is whole."""

import json

import numpy as np
import pytest
from tiny_commands import frames_of

from mochi_lora.data.sources import list_sources
from mochi_lora.errors import UserError
from mochi_lora.tiny import world
from mochi_lora.tiny.dataset import DrawnSet, draw_clips, draw_set
from mochi_lora.tiny.judge import accuracy, judge
from mochi_lora.tiny.style import style_score

COUNT = 12


def drawn_scenes(wanted):
    return [world.draw_scene(wanted.seed, index, motions=wanted.motions, held_out=False) for index in range(wanted.count)]


@pytest.fixture(scope="module", params=["base", "chalk"])
def drawn(request, tmp_path_factory):
    wanted = DrawnSet(request.param, COUNT, seed=2)
    return wanted, draw_set(tmp_path_factory.mktemp("drawn") / request.param, wanted)


def test_every_clip_shows_its_scene_after_the_codec(drawn):
    wanted, folder = drawn
    scenes = drawn_scenes(wanted)
    clips = [frames_of(folder / f"{index:03d}.mp4") for index in range(COUNT)]
    confirmed = [accuracy(judge(clip), scene) for clip, scene in zip(clips, scenes, strict=True)]
    for word in ("colour", "motion", "background", "shape", "size"):
        assert sum(answer[word] for answer in confirmed) >= COUNT - 1, word
    scores = [style_score(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    expected = {"base": 0.0, "chalk": 1.0}[wanted.style]
    assert all(abs(score - expected) < 0.3 for score in scores), scores


def test_captions_begin_with_the_trigger_in_chalk_only(drawn):
    wanted, folder = drawn
    sources, rejected = list_sources(folder)
    assert (len(sources), rejected) == (COUNT, [])
    for source, scene in zip(sources, drawn_scenes(wanted), strict=True):
        opening, sentence = f"{world.TRIGGER}, ", source.caption.removeprefix(f"{world.TRIGGER}, ")
        assert source.caption.startswith(opening) == (wanted.style == "chalk")
        assert sentence in set(world.captions(scene))


def test_no_clip_stands_still_unless_asked():
    """`encode` would refuse it as a frozen recording."""
    assert {scene.motion for scene in drawn_scenes(DrawnSet("base", 200))} == {"left", "right", "up", "down", "grows"}


def test_nothing_held_out_is_drawn():
    for motions in (world.PRETRAINED_MOTIONS, ("circles",)):
        scenes = drawn_scenes(DrawnSet("chalk", 500, motions))
        assert not any(world.is_held_out(s.shape, s.colour, s.background, s.motion) for s in scenes)


def test_a_set_of_one_motion_shows_it_and_says_it(tmp_path):
    wanted = DrawnSet("base", 6, (world.HELD_OUT_MOTION,), seed=1)
    for path in draw_clips(tmp_path, wanted):
        assert judge(frames_of(path)).motion == "circles"
        assert "circl" in path.with_suffix(".txt").read_text(encoding="utf-8")


def test_the_same_set_is_kept_and_gives_the_same_frames(drawn, tmp_path):
    wanted, folder = drawn
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    calls = []
    assert draw_set(folder, wanted, on_clip=calls.append) == folder
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    again = draw_set(tmp_path / "again", wanted, on_clip=calls.append)
    assert calls == list(range(1, COUNT + 1))
    for index in (0, COUNT - 1):
        film, text = f"{index:03d}.mp4", f"{index:03d}.txt"
        assert (again / text).read_bytes() == (folder / text).read_bytes()
        # Not the bytes, which differed once in many runs for a reason not found. Another scene differs by tens of levels.
        one, other = (frames_of(place / film).astype(np.float32) for place in (folder, again))
        assert np.abs(one - other).mean() < 0.5


@pytest.mark.parametrize("change", [{"style": "chalk"}, {"count": 3}, {"motions": ("circles",)}, {"seed": 1}])
def test_another_set_is_refused_where_one_lies(tmp_path, change):
    folder = draw_set(tmp_path / "set", DrawnSet("base", 2))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = DrawnSet(**{"style": "base", "count": 2, **change})
    with pytest.raises(UserError, match="set: exists and is not the drawn set of style"):
        draw_set(folder, other)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", ["", "[1, 2", json.dumps({"version": 0})])
def test_a_folder_with_anything_else_in_it_is_refused(tmp_path, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "drawn.json").write_text(content)
    with pytest.raises(UserError, match="give a new folder"):
        draw_set(tmp_path / "mine", DrawnSet("base", 1))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["drawn.json"]


def test_a_set_that_fails_leaves_nothing_behind(tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_set(tmp_path / "set", DrawnSet("base", 2), on_clip=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_the_current_one_are_taken(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    from pathlib import Path

    draw_set(Path(), DrawnSet("base", 1))
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"000.mp4", "000.txt", "drawn.json"}
