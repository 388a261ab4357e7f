"""`mochi-lora encode --plan`: the truth about an encode run, without the means to make one."""

import json

import pytest
from footage import make_clip
from tiny_commands import index_of, make_image, make_video, mixed, report_of, settings

from mochi_lora.cli import main
from mochi_lora.model.text import TextEncoder
from mochi_lora.model.vae import MochiVae

BUCKETS = "7x32x48, 13x32x48, 7x48x32, 1x32x48"


@pytest.fixture
def clips(tmp_path):
    """A folder with a clip for every fate."""
    folder = tmp_path / "clips"
    folder.mkdir()
    make_video(folder / "long.mp4", frames=21)
    make_video(folder / "exact.mp4", frames=13)
    make_video(folder / "tall.mp4", frames=9, height=48, width=32)
    (folder / "broken.mp4").write_text("not a film")
    for path in folder.glob("*.mp4"):
        path.with_suffix(".txt").write_text("a clip")
    make_image(folder / "still.png")
    make_video(folder / "mute.mp4", frames=7)
    return folder


@pytest.fixture
def no_models(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a plan loads no model")

    monkeypatch.setattr(MochiVae, "load", load)
    monkeypatch.setattr(TextEncoder, "load", load)


def _plan_of(cache):
    (path,) = (cache / "index").glob("*.plan.jsonl")
    return {line["clip"].rsplit("/", 1)[-1]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.usefixtures("no_models")
def test_every_clip_has_its_bucket_its_frames_and_its_reason(tiny, clips, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert main(["encode", "--plan", *settings(tiny, clips, cache, BUCKETS)]) == 0
    plan = _plan_of(cache)
    assert {name: (line["status"], line.get("bucket")) for name, line in plan.items()} == {
        "long.mp4": ("trimmed", "13x32x48"),
        "exact.mp4": ("kept", "13x32x48"),
        "tall.mp4": ("trimmed", "7x48x32"),
        "still.png": ("kept", "1x32x48"),
        "broken.mp4": ("rejected", None),
        "mute.mp4": ("rejected", None),
    }
    assert plan["long.mp4"]["unused_seconds"] == pytest.approx(8 / 30, abs=0.002)
    assert "the first 0.433 of 0.700 s" in plan["long.mp4"]["why"]
    assert "the whole clip" in plan["exact.mp4"]["why"]
    assert plan["still.png"]["why"].startswith("an image: one frame")
    assert "cannot be read as video" in plan["broken.mp4"]["why"]
    assert "no caption" in plan["mute.mp4"]["why"]
    printed = capsys.readouterr().out
    for title in ("by clip", "by bucket", "by source", "left out"):
        assert title in printed
    assert list(cache.iterdir()) == [cache / "index"], "a plan writes no entry"


def _rows_by_clip(printed):
    """Cells of the table by clip, and what its title says beside that."""
    title, rest = printed.split("by clip", 1)[1].split("\n", 1)
    lines = rest.split("by bucket")[0].splitlines()
    return title, [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


@pytest.mark.usefixtures("no_models")
def test_each_clip_is_printed_with_its_bucket_frames_and_what_is_dropped_and_why(tiny, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mochi_lora.console.console._width", 1000)
    assert main(["encode", "--plan", *settings(tiny, clips, tmp_path / "cache", BUCKETS)]) == 0
    _, rows = _rows_by_clip(capsys.readouterr().out)
    plan = _plan_of(tmp_path / "cache")
    used = {name: line for name, line in plan.items() if line["status"] != "rejected"}
    assert rows == [
        [str(clips / name), line["bucket"], str(line["source_frames"]), f"{line['unused_seconds']:.3f}", line["why"]]
        for name, line in used.items()
    ]


@pytest.mark.usefixtures("no_models")
def test_of_many_clips_those_that_drop_most_are_printed_and_the_file_of_all_is_named(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mochi_lora.console.console._width", 1000)
    film = make_video(tmp_path / "film.mp4", frames=30)
    rows = [{"file_name": film.name, "text": "x", "end": 0.25} for _ in range(44)] + [{"file_name": film.name, "text": "x"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["encode", "--plan", *settings(tiny, tmp_path / "t.jsonl", tmp_path / "cache")]) == 0
    title, printed = _rows_by_clip(capsys.readouterr().out)
    (path,) = (tmp_path / "cache" / "index").glob("*.plan.jsonl")
    assert title.strip() == f": the 40 of 45 that drop most; all are in {path}"
    assert len(printed) == 40
    assert printed[0][3] == "0.767"
    assert len(path.read_text().splitlines()) == 45


@pytest.mark.parametrize("buckets", ["7x32x48", "7x32x48, 1x32x48"])
def test_an_image_in_a_bucket_that_nobody_asked_for_is_said_aloud(tiny, tmp_path, buckets, capsys):
    make_image(tmp_path / "clips" / "still.png")
    words = settings(tiny, tmp_path / "clips", tmp_path / "cache", buckets)
    assert main(["encode", "--plan", *words]) == 0
    planned = capsys.readouterr().out
    assert main(["encode", *words]) == 0
    encoded = capsys.readouterr().out
    why = _plan_of(tmp_path / "cache")["still.png"]["why"]
    for told in (planned, encoded):
        assert ("images that become 1x32x48, a bucket that is not configured: 1" in " ".join(told.split())) == (
            buckets == "7x32x48"
        )
    assert ("though 1x32x48 is not configured" in why) == (buckets == "7x32x48")


def test_encode_does_what_the_plan_said(tiny, clips, tmp_path):
    cache = tmp_path / "cache"
    words = settings(tiny, clips, cache, BUCKETS)
    assert main(["encode", "--plan", *words]) == 0
    assert main(["encode", *words]) == 0
    plan, report = _plan_of(cache), report_of(cache)
    assert plan.keys() == report.keys()
    for name, line in report.items():
        assert line["status"] == plan[name]["status"], name
        assert line.get("bucket") == plan[name].get("bucket"), name
        assert line.get("unused_seconds") == plan[name].get("unused_seconds"), name
        assert line.get("reason", "") in plan[name]["why"], name


def test_frames_of_the_file_are_told_apart_from_frames_of_the_clip(tiny, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    make_clip(clips / "slow.mp4", frames=24, rate="15").with_suffix(".txt").write_text("a clip")
    assert main(["encode", "--plan", *settings(tiny, clips, tmp_path / "cache", "13x32x64")]) == 0
    (line,) = _plan_of(tmp_path / "cache").values()
    assert (line["frames"], line["source_frames"]) == (13, 7)
    assert "13 frames at 30 fps from 7 of the file" in line["why"]
    assert "128x64 reduced to 50%" in line["why"]


@pytest.mark.usefixtures("no_models")
def test_a_mix_is_planned_part_by_part_with_its_draws(tiny, clips, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    for colour in range(3):
        make_image(pictures / f"{colour}.png", colour=90 * colour)
    mix = [{"clips": str(clips), "weight": 3}, {"clips": str(pictures), "weight": 1, "buckets": ["1x16x16"]}]
    assert main(["encode", "--plan", *mixed(tiny, tmp_path / "cache", mix, BUCKETS)]) == 0
    plan = _plan_of(tmp_path / "cache")
    assert {line["bucket"] for line in plan.values() if line["part"] == str(pictures)} == {"1x16x16"}
    printed = capsys.readouterr().out.split("an epoch")[1]
    rows = [line for line in printed.splitlines() if "%" in line]
    assert ["9" in row and "75.0%" in row for row in rows] == [True, False]
    assert "3" in rows[1]
    assert "25.0%" in rows[1]


def test_when_nothing_is_left_the_plan_fails(tiny, tmp_path, capsys):
    make_image(tmp_path / "clips" / "a.png", caption=None)
    assert main(["encode", "--plan", *settings(tiny, tmp_path / "clips", tmp_path / "cache", BUCKETS)]) == 1
    assert "no clip could be used" in capsys.readouterr().err


def test_the_index_is_not_touched(tiny, clips, tmp_path):
    cache = tmp_path / "cache"
    words = settings(tiny, clips, cache, BUCKETS)
    assert main(["encode", *words]) == 0
    before = index_of(cache)
    assert main(["encode", "--plan", *words]) == 0
    assert index_of(cache) == before
