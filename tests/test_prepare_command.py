"""`mochi-lora prepare`: what it writes and says, and that it can be stopped, broken and run again."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from footage import absurd
from scenes import black, faded, scene, write

from mochi_lora.cli import main
from mochi_lora.curation import footage as footage_room
from mochi_lora.data.sources import list_sources

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two films of two shots each, one file that is none. Tests copy it."""
    folder = tmp_path_factory.mktemp("films") / "footage"
    (folder / "deep").mkdir(parents=True)
    write(folder / "one.mp4", np.concatenate([scene(1, 60, detail=5), scene(2, 60, detail=5)]))
    write(folder / "deep" / "two.mkv", np.concatenate([scene(3, 60, detail=5), black(40), scene(4, 60, detail=5)]))
    (folder / "broken.mp4").write_bytes(b"no film")
    (folder / ".hidden.mp4").write_bytes(b"no film")
    return folder


@pytest.fixture
def work(tmp_path, films):
    """A copy of the films and the words after a step's name; the folder of the tables is `tmp_path`/prepared."""
    shutil.copytree(films, tmp_path / "footage")
    (tmp_path / "film.yaml").write_text(f"prepare: {{footage: {tmp_path}/footage, folder: {tmp_path}/prepared}}\n")
    return tmp_path, ["--config", str(tmp_path / "film.yaml")]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tables(folder: Path) -> dict[str, str]:
    names = ("split.jsonl", "clips.jsonl", "refused.jsonl", "footage.jsonl", "filter.json")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def prepare(words: list[str]) -> None:
    for step in ("split", "filter"):
        assert main(["prepare", "--only", step, *words]) == 0


def test_footage_becomes_tables_of_clips_and_reasons(work, capsys):
    folder, words = work
    prepare(words)
    told = capsys.readouterr().out
    kept, refused = rows(folder / "prepared/clips.jsonl"), rows(folder / "prepared/refused.jsonl")
    assert [(row["file_name"], row["shot"]) for row in kept] == [
        ("../footage/deep/two.mkv", 0),
        ("../footage/deep/two.mkv", 2),
        ("../footage/one.mp4", 0),
        ("../footage/one.mp4", 1),
    ]
    assert set(kept[0]) == {"file_name", "start", "end", "text", "crop", "source", "shot", "measures", "flags", "refused"}
    assert [row["refused"] for row in refused] == ["black: 1 is above filter.max_black 0"]
    by_source = {Path(row["source"]).name: row for row in rows(folder / "prepared/footage.jsonl")}
    assert set(by_source) == {"one.mp4", "two.mkv", "broken.mp4"}
    assert "cannot be read" in by_source["broken.mp4"]["refused"]
    assert "cannot be read" in told
    assert "refused: black" in told
    assert "what the limits are cut from" in told
    assert f"kept     {folder}/prepared/clips.jsonl" in told
    limits = {one["setting"]: one for one in json.loads((folder / "prepared/filter.json").read_text())}
    assert (limits["max_black"]["refused"], limits["max_black"]["clips"]) == (1, 5)


def test_the_table_is_what_encode_takes(work):
    folder, words = work
    (folder / "footage/one.txt").write_text("two scenes of clouds\n", encoding="utf-8")
    prepare(words)
    sources, rejections = list_sources(folder / "prepared/clips.jsonl")
    assert [(source.path.name, source.caption) for source in sources] == [("one.mp4", "two scenes of clouds")] * 2
    assert {rejection.reason.split(":")[0] for rejection in rejections} == {"caption is empty"}


def test_all_steps_run_in_turn_and_the_next_command_is_named(work, monkeypatch, capsys):
    folder, words = work
    seen = []

    def run(_, *, clips):
        seen.append(len(rows(clips)))

    caption = types.ModuleType("mochi_lora.commands.caption")
    caption.run = run
    monkeypatch.setitem(sys.modules, caption.__name__, caption)
    monkeypatch.setattr("mochi_lora.commands.caption", caption, raising=False)
    (folder / "elsewhere").mkdir()
    elsewhere = ("--caption.clips", str(folder / "elsewhere"))  # for `mochi-lora caption`: not what was just prepared
    table = folder / "prepared/clips.jsonl"

    def told(*more):
        assert main(["prepare", *words, *elsewhere, *more]) == 0
        return capsys.readouterr().out.strip().splitlines()[-1]

    typed = shlex.join([*words, *elsewhere])
    assert told() == f"next     mochi-lora encode {typed} --data.clips {table}"
    assert seen == [4]
    assert told("--data.clips", str(table)) == f"next     mochi-lora encode {typed} --data.clips {table}"
    mix = f"[{{clips: {table}, trigger: chalk style}}]"
    assert told("--data.mix", mix) == f"next     mochi-lora encode {typed} --data.mix {shlex.quote(mix)}"
    assert told("--data.mix", "[{clips: other}]") == f"next     add {{clips: {table}}} to data.mix; then mochi-lora encode"
    assert main(["prepare", "--only", "split", *words]) == 0
    told_after = capsys.readouterr().out.strip().splitlines()[-1]
    assert told_after.startswith(f"next     mochi-lora prepare --only filter {shlex.join(words)}   (or ")


def test_encoding_follows_at_once_where_every_clip_has_a_caption(work, monkeypatch, capsys):
    folder, words = work
    without, encoded = 2, []
    for name, run in (
        ("caption", lambda _, *, clips: without),
        ("encode", lambda config, **_: encoded.append(config.data.clips)),
    ):
        module = types.ModuleType(f"mochi_lora.commands.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(module.__name__, module, raising=False)
    assert main(["prepare", "--encode", *words]) == 1
    assert "2 clips of" in capsys.readouterr().err
    assert encoded == []
    without = 0
    assert main(["prepare", "--encode", *words]) == 0
    assert encoded == [folder / "prepared/clips.jsonl"]
    assert main(["prepare", "--encode", *words, "--data.mix", "[{clips: other}]"]) == 1
    assert "data.mix has no entry for" in capsys.readouterr().err


def test_clips_too_short_for_every_bucket_are_refused_before_anything_is_decoded(work, capsys):
    folder, words = work
    long = [*words, "--data.buckets", "[163x480x848, 85x480x848]"]
    assert main(["prepare", *long, "--split.frames", "37"]) == 1
    assert "split.frames to 85 or more" in capsys.readouterr().err
    assert not (folder / "prepared").exists()
    mix = f"[{{clips: {folder / 'prepared/clips.jsonl'}, buckets: [85x480x848]}}]"
    assert main(["prepare", *words, "--data.mix", mix, "--split.frames", "37"]) == 1


def test_a_second_run_decodes_nothing_and_writes_the_same(work, monkeypatch):
    folder, words = work
    prepare(words)
    before = tables(folder / "prepared")

    def never(*_):
        raise AssertionError("surveyed again")

    monkeypatch.setattr(footage_room, "survey_source", never)
    prepare([*words, "--prepare.workers", "1"])
    assert tables(folder / "prepared") == before
    assert main(["prepare", "--only", "split", *words, "--split.mode", "head", "--split.margin", "0.2"]) == 0
    assert len(rows(folder / "prepared/split.jsonl")) == 5


def test_captions_survive_a_second_filtering(work):
    folder, words = work
    prepare(words)
    table = folder / "prepared/clips.jsonl"
    written = [{**row, "text": f"caption {number}"} for number, row in enumerate(rows(table))]
    table.write_text("".join(json.dumps(row) + "\n" for row in written))
    prepare(words)
    assert [row["text"] for row in rows(table)] == [f"caption {number}" for number in range(4)]
    table.write_text("{half a line")
    assert main(["prepare", "--only", "filter", *words]) == 1
    assert table.read_text() == "{half a line"


def captioned(table: Path) -> dict[tuple, str]:
    """Writes a caption for each clip of the table, as a person does; what was written."""
    written = [{**row, "text": f"caption {number}"} for number, row in enumerate(rows(table))]
    table.write_text("".join(json.dumps(row) + "\n" for row in written))
    return texts(table)


def texts(table: Path) -> dict[tuple, str]:
    return {(row["file_name"], row["start"]): row["text"] for row in rows(table) if row["text"]}


def test_captions_of_clips_that_a_limit_refuses_come_back_with_them(work):
    folder, words = work
    prepare(words)
    table = folder / "prepared/clips.jsonl"
    written = captioned(table)
    limits = {one["setting"]: one["percentiles"] for one in json.loads((folder / "prepared/filter.json").read_text())}
    sharpest = str(limits["min_sharpness"]["75"])
    assert main(["prepare", "--only", "filter", *words, "--filter.min_sharpness", sharpest]) == 0
    assert 0 < len(texts(table)) < 4
    assert texts(table) | texts(folder / "prepared/refused.jsonl") == written
    assert main(["prepare", "--only", "filter", *words]) == 0
    assert texts(table) == written
    table.write_text("".join(json.dumps({**row, "text": ""}) + "\n" for row in rows(table)))
    assert main(["prepare", "--only", "filter", *words]) == 0
    assert texts(table) == {}, "a caption that a person takes away stays away"


def change(table: Path, changes: dict[int, dict | None]) -> list[tuple]:
    """The lines of `table` with new columns, or deleted; the clips that changed."""
    before = rows(table)
    after = [{**row, **(changes.get(place) or {})} for place, row in enumerate(before) if changes.get(place, {}) is not None]
    table.write_text("".join(json.dumps(row) + "\n" for row in after))
    return [(before[place]["file_name"], before[place]["start"]) for place in changes]


def clips_of(table: Path) -> list[tuple]:
    return [(row["file_name"], row["start"]) for row in rows(table)]


def told_of_hands(text: str) -> str:
    return next((line for line in text.splitlines() if line.startswith("by hand")), "")


def test_clips_that_a_person_deletes_or_refuses_stay_out_when_a_video_comes_in(work, capsys):
    folder, words = work
    prepare(words)
    table, by_hand = folder / "prepared/clips.jsonl", folder / "prepared/by_hand.jsonl"
    everything = clips_of(table)
    assert not by_hand.exists()
    out = change(table, {0: None, 3: {"refused": "a watermark"}})
    write(folder / "footage/three.mp4", scene(9, 60, detail=5))
    for _ in range(2):
        capsys.readouterr()
        prepare(words)
        assert told_of_hands(capsys.readouterr().out).startswith(f"by hand  2 clips are out, {by_hand} has them")
        assert clips_of(table) == [*everything[1:3], ("../footage/three.mp4", rows(table)[-1]["start"])]
        reasons = {(row["file_name"], row["start"]): row["refused"] for row in rows(folder / "prepared/refused.jsonl")}
        assert reasons[out[0]] == "by hand: its line in clips.jsonl was deleted"
        assert reasons[out[1]] == "by hand: a watermark"
    by_hand.write_text("".join(by_hand.read_text().splitlines(keepends=True)[1:]))
    prepare(words)
    assert clips_of(table)[:3] == everything[:3], "one comes back, as the message says"
    by_hand.unlink()
    capsys.readouterr()
    prepare(words)
    assert clips_of(table)[:4] == everything
    assert told_of_hands(capsys.readouterr().out) == ""


def test_a_line_put_back_and_limits_that_change_undo_and_make_no_decision(work):
    folder, words = work
    prepare(words)
    table = folder / "prepared/clips.jsonl"
    before = table.read_text()
    change(table, {1: None})
    prepare(words)
    assert len(rows(table)) == 3
    table.write_text(before)
    prepare(words)
    assert table.read_text() == before
    limits = {one["setting"]: one["percentiles"] for one in json.loads((folder / "prepared/filter.json").read_text())}
    assert main(["prepare", "--only", "filter", *words, "--filter.min_sharpness", str(limits["min_sharpness"]["75"])]) == 0
    assert len(rows(table)) < 4
    prepare(words)
    assert table.read_text() == before
    table.unlink()
    prepare(words)
    assert table.read_text() == before, "a table deleted whole is made anew"


def test_a_crop_by_hand_stays_until_its_line_goes(work):
    folder, words = work
    prepare(words)
    table = folder / "prepared/clips.jsonl"
    change(table, {2: {"crop": [10, 0, 200, 100]}})
    for _ in range(2):
        prepare(words)
        assert [row["crop"] for row in rows(table)] == [None, None, [10, 0, 200, 100], None]
    change(table, {2: {"crop": None}})
    prepare(words)
    assert [row["crop"] for row in rows(table)] == [None] * 4
    change(table, {2: {"crop": "10 0 200 100"}})
    before = table.read_text()
    assert main(["prepare", "--only", "filter", *words]) == 1
    assert table.read_text() == before


def test_a_clip_like_one_that_is_out_by_hand_does_not_take_its_place(work):
    folder, words = work
    shutil.copy(folder / "footage/one.mp4", folder / "footage/twin.mp4")
    prepare(words)
    table = folder / "prepared/clips.jsonl"
    kept = clips_of(table)
    assert len(kept) == 4, "the twins are duplicates"
    change(table, {2: None, 3: None})
    prepare(words)
    assert clips_of(table) == kept[:2]


def test_a_line_whose_start_was_changed_is_named_and_not_lost(work, capsys):
    folder, words = work
    prepare(words)
    table = folder / "prepared/clips.jsonl"
    change(table, {0: {"start": 0.5}})
    before = table.read_text()
    assert main(["prepare", "--only", "filter", *words]) == 1
    assert "clips.jsonl:1" in capsys.readouterr().err
    assert table.read_text() == before


def test_captions_of_clips_that_a_new_split_has_not_are_kept_and_it_is_said(work, capsys):
    folder, words = work
    prepare(words)
    table = folder / "prepared/clips.jsonl"
    written = captioned(table)
    capsys.readouterr()
    prepare([*words, "--split.margin", "0.3"])
    assert "captions of 4 clips that are no more" in capsys.readouterr().out.replace("\n", " ")
    assert texts(table) == {}
    assert texts(folder / "prepared/texts.jsonl") == written
    prepare([*words, "--split.margin", "0.4"])
    capsys.readouterr()
    prepare(words)
    assert texts(table) == written
    assert "that are no more" not in capsys.readouterr().out


def test_a_caption_file_that_all_clips_of_a_video_share_is_no_lost_caption(work, capsys):
    folder, words = work
    (folder / "footage/one.txt").write_text("two scenes of clouds\n", encoding="utf-8")
    prepare(words)
    prepare([*words, "--split.margin", "0.3"])
    assert "that are no more" not in capsys.readouterr().out


def test_every_second_of_footage_is_in_a_clip_or_lost_to_something_named(work, capsys):
    """Shots of 2.5 s at 24 a second: 37 frames at 30 fit once; what is left is 1.07 s, and 0.1 s at both ends."""
    folder, words = work
    write(folder / "footage/fade.mp4", np.concatenate([faded(scene(7, 60, detail=5), out=16), black(4)]))
    write(folder / "footage/short.mp4", np.concatenate([scene(1, 20, detail=5), scene(2, 24, detail=5)]))
    for name in ("a.MXV", "b.jpg", "c.JPG", "one.txt", ".hidden.jpg", "Makefile"):
        (folder / "footage" / name).write_text("a scene")
    assert main(["prepare", "--only", "split", *words]) == 0
    told = capsys.readouterr().out
    by_name = {Path(row["source"]).name: row for row in rows(folder / "prepared/footage.jsonl")}
    assert by_name["one.mp4"]["seconds_in_clips"] == pytest.approx(2 * 37 / 30, abs=0.05)
    assert by_name["one.mp4"]["seconds_lost"] == {
        "fades": 0.0,
        "margins": pytest.approx(4 * 0.1, abs=0.13),
        "short_shots": 0.0,
        "rest_of_shots": pytest.approx(5 - 2 * 37 / 30 - 0.4, abs=0.2),
    }
    assert by_name["two.mkv"]["seconds_lost"]["fades"] == 0.0
    assert by_name["fade.mp4"]["seconds_lost"]["fades"] > 20 / 24
    for name in ("one.mp4", "two.mkv", "fade.mp4", "short.mp4"):
        row = by_name[name]
        assert row["seconds_in_clips"] + sum(row["seconds_lost"].values()) == pytest.approx(row["seconds"], abs=0.01), name
    why = by_name["short.mp4"]["refused"]
    assert why.startswith("no clip of 37 frames (1.23 s) in its 1.8 s: 2 shots, the longest has 0.77 s")
    assert by_name["short.mp4"]["seconds_lost"]["short_shots"] == pytest.approx(44 / 24, abs=0.01)
    assert why[:60] in told  # then the table breaks the line
    assert re.search(r"videos refused\W+2\W+1\.8 s of those", told)
    assert "files not looked at" in told
    assert "2 .jpg 1 .mxv 1 (no suffix)" in told or "2 .jpg 1 (no suffix) 1 .mxv" in told


def test_overlapping_clips_count_a_second_once(work):
    folder, words = work
    assert main(["prepare", "--only", "split", *words, "--split.mode", "slide", "--split.stride", "8"]) == 0
    for row in rows(folder / "prepared/footage.jsonl"):
        if "refused" not in row:
            assert row["seconds_in_clips"] <= row["seconds"]
            assert row["seconds_in_clips"] + sum(row["seconds_lost"].values()) == pytest.approx(row["seconds"], abs=0.01)


def test_filtering_before_splitting_says_what_to_do_first(work, capsys):
    _, words = work
    assert main(["prepare", "--only", "filter", *words]) == 1
    assert "split.jsonl: not there yet; run mochi-lora prepare first" in capsys.readouterr().err


def test_limits_that_let_nothing_through_say_so(work, capsys):
    folder, words = work
    assert main(["prepare", "--only", "split", *words]) == 0
    assert main(["prepare", "--only", "filter", *words, "--filter.min_luma", "0.99"]) == 1
    assert "no clip passes the limits" in capsys.readouterr().err
    assert len(rows(folder / "prepared/refused.jsonl")) == 5


def test_clips_longer_than_every_shot_say_so(work, capsys):
    _, words = work
    assert main(["prepare", "--only", "split", *words, "--split.frames", "163"]) == 1
    assert "no clip of 163 frames" in capsys.readouterr().err


def test_a_name_that_is_not_utf_8_is_left_out_by_name(tmp_path):
    """The tables could not hold it: after the survey of a whole folder, none was written."""
    good = tmp_path / "good.mp4"
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    for path in (good, odd):
        path.write_bytes(b"?")
    assert footage_room.list_footage(tmp_path, tmp_path / "prepared") == (
        [good],
        {f"({tmp_path}/caf\\xe9.mp4: not UTF-8, rename it)": 1},
    )


@pytest.mark.parametrize(
    ("make", "expected"), [(None, "does not exist"), ("folder", "no video in"), ("notes.txt", "no video in")]
)
def test_no_footage_is_named(tmp_path, capsys, make, expected):
    if make == "folder":
        (tmp_path / "raw").mkdir()
    elif make:
        (tmp_path / "raw").write_text("words")
    (tmp_path / "film.yaml").write_text(f"prepare: {{footage: {tmp_path}/raw, folder: {tmp_path}/prepared}}\n")
    assert main(["prepare", "--only", "split", "--config", str(tmp_path / "film.yaml")]) == 1
    assert f"prepare.footage: {'' if 'exist' not in expected else str(tmp_path) + '/raw '}{expected}" in capsys.readouterr().err


def test_a_folder_inside_the_footage_is_not_taken_for_footage(work):
    folder, words = work
    inside = folder / "footage" / "prepared"
    inside.mkdir()
    shutil.copy(folder / "footage" / "one.mp4", inside / "old.mp4")
    assert main(["prepare", "--only", "split", *words, "--prepare.folder", str(inside)]) == 0
    assert {Path(row["source"]).name for row in rows(inside / "footage.jsonl")} == {"one.mp4", "two.mkv", "broken.mp4"}
    assert rows(inside / "split.jsonl")[0]["file_name"] == "../deep/two.mkv"


def test_a_video_that_goes_away_meanwhile_is_no_other_videos_failure(work, monkeypatch):
    folder, words = work
    read = footage_room.survey_source

    def survey(*given):  # deep/two.mkv comes first
        (folder / "footage/one.mp4").unlink()
        return read(*given)

    monkeypatch.setattr(footage_room, "survey_source", survey)
    assert main(["prepare", "--only", "split", *words, "--prepare.workers", "1"]) == 0
    told = {Path(row["source"]).name: row for row in rows(folder / "prepared/footage.jsonl")}
    assert told["one.mp4"]["refused"] == "cannot be read (No such file or directory)"
    assert told["two.mkv"]["clips"] == 3


def test_the_survey_of_a_video_that_changes_meanwhile_is_not_kept_as_that_of_the_changed_one(work, monkeypatch):
    folder, words = work
    (folder / "footage/one.mp4").unlink()
    film, read, seen = folder / "footage/deep/two.mkv", footage_room.survey_source, []

    def survey(*given):
        made = read(*given)
        seen.append(len(made.times))
        write(film, scene(5, 60 + len(seen), detail=5))
        return made

    monkeypatch.setattr(footage_room, "survey_source", survey)
    for _ in range(2):
        assert main(["prepare", "--only", "split", *words]) == 0
    assert seen == [160, 61]


def test_ctrl_c_keeps_the_surveys_that_are_done(work, monkeypatch):
    folder, words = work
    read, seen = footage_room.survey_source, []

    def survey_one(*given):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return read(*given)

    with monkeypatch.context() as patch:
        patch.setattr(footage_room, "survey_source", survey_one)
        assert main(["prepare", "--only", "split", *words, "--prepare.workers", "1"]) == 130
    (done,) = (folder / "prepared/survey").iterdir()
    stamp = done.stat().st_mtime_ns
    prepare(words)
    assert done.stat().st_mtime_ns == stamp
    assert len(list((folder / "prepared/survey").iterdir())) == 2


def test_the_scripts_are_the_command(monkeypatch):
    import runpy

    for script, step in (("split_scenes", "split"), ("filter_clips", "filter")):
        monkeypatch.setattr(sys, "argv", [script, "--config", "film.yaml"])
        calls = []
        monkeypatch.setattr("mochi_lora.cli.main", lambda words, calls=calls: calls.append(words) or 0)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "data_prep" / f"{script}.py"), run_name="__main__")
        assert stop.value.code == 0
        assert calls == [["prepare", "--only", step, "--config", "film.yaml"]]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_never_killed(work, tmp_path_factory):
    """SIGKILL as soon as the first survey is there."""
    folder, words = work
    for number in range(3, 9):
        write(folder / "footage" / f"{number}.mp4", np.concatenate([scene(10 + number, 80), scene(20 + number, 80)]))
    run = [sys.executable, "-m", "mochi_lora", "prepare", "--only", "split", *words, "--prepare.workers", "1"]
    process = subprocess.Popen(run, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(folder.glob("prepared/survey/*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in folder.glob("prepared/survey/*.safetensors")}
    assert len(done) < 8, "the run was over before the kill: nothing was proven"
    (folder / "prepared/survey/half.safetensors.tmp-1-0").write_bytes(b"half")
    prepare(words)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list((folder / "prepared/survey").iterdir())) == 8
    killed = tables(folder / "prepared")
    shutil.rmtree(folder / "prepared")
    prepare(words)
    assert tables(folder / "prepared") == killed
    keys = [(row["file_name"], row["start"]) for row in rows(folder / "prepared/split.jsonl")]
    assert len(keys) == len(set(keys)) == 5 + 6 * 4


@pytest.mark.slow
def test_bad_files_among_two_hundred_are_listed_and_all_others_come_through(tmp_path):
    raw = tmp_path / "footage"
    raw.mkdir()
    good = write(tmp_path / "good.mp4", scene(1, 45, size=(160, 96), detail=5)).read_bytes()
    narrow = write(tmp_path / "narrow.mp4", scene(1, 45, size=(640, 8), detail=5)).read_bytes()
    ways = {"empty": b"", "cut": good[: len(good) // 2], "text": b"hello" * 50, "noise": bytes(range(256)) * 40}
    ways |= {"absurd": absurd(good), "narrow": narrow}
    bad = {f"{name} {number:03}.mp4": content for name, content in ways.items() for number in range(5)}
    for name, content in {**{f"good {number:03}.mp4": good for number in range(170)}, **bad}.items():
        (raw / name).write_bytes(content)
    (tmp_path / "film.yaml").write_text(f"prepare: {{footage: {raw}, folder: {tmp_path}/prepared}}\n")
    assert main(["prepare", "--only", "split", "--config", str(tmp_path / "film.yaml")]) == 0
    told = rows(tmp_path / "prepared/footage.jsonl")
    assert {Path(row["source"]).name for row in told if "refused" in row} == set(bad)
    assert len(rows(tmp_path / "prepared/split.jsonl")) == 170
