"""`mochi-lora prepare`: what it writes and says, and that it can be stopped, broken and run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from scenes import black, scene, write

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

    def run(config):
        seen.append(len(rows(config.prepare.folder / "clips.jsonl")))

    caption = types.ModuleType("mochi_lora.commands.caption")
    caption.run = run
    monkeypatch.setitem(sys.modules, caption.__name__, caption)
    monkeypatch.setattr("mochi_lora.commands.caption", caption, raising=False)
    assert main(["prepare", *words]) == 0
    assert seen == [4]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"next     mochi-lora encode --config <the same file> --data.clips {folder}/prepared/clips.jsonl"


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
    ways = {"empty": b"", "cut": good[: len(good) // 2], "text": b"hello" * 50, "noise": bytes(range(256)) * 40}
    bad = {f"{name} {number:03}.mp4": content for name, content in ways.items() for number in range(5)}
    for name, content in {**{f"good {number:03}.mp4": good for number in range(180)}, **bad}.items():
        (raw / name).write_bytes(content)
    (tmp_path / "film.yaml").write_text(f"prepare: {{footage: {raw}, folder: {tmp_path}/prepared}}\n")
    assert main(["prepare", "--only", "split", "--config", str(tmp_path / "film.yaml")]) == 0
    told = rows(tmp_path / "prepared/footage.jsonl")
    assert {Path(row["source"]).name for row in told if "refused" in row} == set(bad)
    assert len(rows(tmp_path / "prepared/split.jsonl")) == 180
