"""SIGKILL at file operations all through `mochi-lora prepare`, then the same command again: the same tables, every caption."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from scenes import black, scene, write
from warm_processes import Watch, ended, start

pytestmark = pytest.mark.slow

STRIDE = 7  # coprime to the operations of one file, so that every kind of moment comes; 1 takes seven times as long
TABLES = ("split.jsonl", "clips.jsonl", "refused.jsonl", "footage.jsonl", "filter.json")


@pytest.fixture(scope="module")
def films(tmp_path_factory, tiny):
    """Words of the whole command, and the folder beside which everything lies; `prepared` is what an unkilled run makes."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "footage").mkdir()
    write(folder / "footage" / "one.mp4", np.concatenate([scene(1, 60, detail=5), scene(2, 60, detail=7)]))
    write(folder / "footage" / "two.mkv", np.concatenate([scene(3, 60, detail=5), black(40), scene(4, 60, detail=4)]))
    (folder / "footage" / "broken.mp4").write_bytes(b"no film")
    (folder / "footage" / "one.txt").write_text("A scene of clouds.")  # with no model, some clip has to have a caption
    (folder / "film.yaml").write_text(f"prepare: {{footage: {folder}/footage, folder: {folder}/prepared, workers: 1}}\n")
    settings = ("--caption.model", "null", "--model.base", str(tiny))
    words = ["prepare", "--config", str(folder / "film.yaml"), *settings]
    assert ended(start(words, folder / "log", watch=Watch(folder / "prepared", folder / "count"))) == 0, (
        folder / "log"
    ).read_text()
    return folder, words


def tables(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text(encoding="utf-8") for name in TABLES}


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_a_kill_anywhere_and_the_same_command_again_end_as_if_never_killed(films, tmp_path):
    """Killed runs lie beside the first: names in the tables are relative to their folder."""
    folder, words = films
    operations = int((folder / "count").read_text())
    assert operations > 30, "surveys and tables"
    for kill_at in range(1, operations + 1, STRIDE):
        run = folder / f"killed-at-{kill_at}"
        again = [*words, "--prepare.folder", str(run)]
        assert ended(start(again, tmp_path / "log", watch=Watch(run, tmp_path / "count", kill_at))) == -signal.SIGKILL
        assert ended(start(again, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
        assert tables(run) == tables(folder / "prepared"), kill_at
        assert files(run) - {Path("texts.jsonl")} == files(folder / "prepared"), kill_at  # a second filtering writes it


def test_no_kill_loses_a_caption_whatever_the_limits_were(films, tmp_path):
    """Limits that refuse some captioned clips, killed; then the former limits."""
    folder, words = films
    captioned, run = tmp_path / "captioned", folder / "changed"
    shutil.copytree(folder / "prepared", captioned)
    rows = [json.loads(line) for line in (captioned / "clips.jsonl").read_text().splitlines()]
    written = [{**row, "text": f"caption {number}"} for number, row in enumerate(rows)]
    (captioned / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    sharpness = sorted(row["measures"]["sharpness"] for row in rows)
    limits = ("--filter.min_sharpness", str(sharpness[2]))
    back = [*words, "--prepare.folder", str(run), "--only", "filter"]

    def texts() -> list[str]:
        return [json.loads(line)["text"] for line in (run / "clips.jsonl").read_text().splitlines()]

    shutil.copytree(captioned, run)
    assert ended(start([*back, *limits], tmp_path / "log", watch=Watch(run, tmp_path / "count"))) == 0
    assert 0 < len(texts()) < len(rows), "some are refused"
    for kill_at in range(1, int((tmp_path / "count").read_text()) + 1, STRIDE):
        for first, then in ((limits, ()), ((), limits)):  # killed on the way there, and on the way back
            shutil.rmtree(run)
            shutil.copytree(captioned, run)
            if not first:
                assert ended(start([*back, *then], tmp_path / "log")) == 0
            killed = ended(start([*back, *first], tmp_path / "log", watch=Watch(run, tmp_path / "count", kill_at)))
            assert killed == -signal.SIGKILL
            assert ended(start(back, tmp_path / "log")) == 0
            assert texts() == [row["text"] for row in written], (kill_at, first)


def test_no_kill_loses_a_persons_decision_or_makes_one(films, tmp_path):
    """A line deleted, one refused, one cropped, and limits that refuse a fourth clip, killed; then the former limits."""
    folder, words = films
    decided, run = tmp_path / "decided", folder / "decided"
    shutil.copytree(folder / "prepared", decided)
    rows = [json.loads(line) for line in (decided / "clips.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    by_sharpness = sorted(rows, key=lambda row: row["measures"]["sharpness"])
    out, cropped, gone, blurred = by_sharpness[3], by_sharpness[2], by_sharpness[1], by_sharpness[0]
    changed = {id(out): {"refused": "a watermark"}, id(cropped): {"crop": [10, 0, 200, 100]}}
    there = [{**row, **changed.get(id(row), {})} for row in rows if row is not gone]
    (decided / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in there))
    back = [*words, "--prepare.folder", str(run), "--only", "filter"]
    away = [*back, "--filter.min_sharpness", str((blurred["measures"]["sharpness"] + gone["measures"]["sharpness"]) / 2)]

    def kept() -> list[tuple]:
        lines = (json.loads(line) for line in (run / "clips.jsonl").read_text().splitlines())
        return [(row["file_name"], row["start"], row["crop"]) for row in lines]

    wanted = [(row["file_name"], row["start"], row["crop"]) for row in there if row["refused"] is None]
    shutil.copytree(decided, run)
    assert ended(start(away, tmp_path / "log", watch=Watch(run, tmp_path / "count"))) == 0
    assert len(kept()) == 1, "the limit refuses one of the two that a person wants"
    for kill_at in range(1, int((tmp_path / "count").read_text()) + 1, 3):
        shutil.rmtree(run)
        shutil.copytree(decided, run)
        assert ended(start(away, tmp_path / "log", watch=Watch(run, tmp_path / "count", kill_at))) == -signal.SIGKILL
        assert ended(start(back, tmp_path / "log")) == 0
        assert kept() == wanted, kill_at


def test_a_kill_while_captions_are_taken_over_leaves_a_correction_a_correction(films, tmp_path):
    """Between table and sheet too: what the sheet calls known by then, no later run would write over a caption again."""
    folder, words = films
    run, written = folder / "corrected", tmp_path / "written"
    caption = ["caption", *words[1:], "--prepare.folder", str(run)]

    def sheet() -> list[dict]:
        return [json.loads(line) for line in (run / "captions.jsonl").read_text().splitlines()]

    def correct(text: str) -> None:
        first, *others = sheet()
        lines = [{**first, "text": text}, *others]
        (run / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def texts() -> list[str]:
        return [json.loads(line)["text"] for line in (run / "clips.jsonl").read_text().splitlines()]

    shutil.copytree(folder / "prepared", run)
    correct("What was written first.")
    assert ended(start(caption, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert "What was written first." in texts()
    correct("A correction.")
    shutil.copytree(run, written)
    assert ended(start(caption, tmp_path / "log", watch=Watch(run, tmp_path / "count"))) == 0
    wanted, known = texts(), sheet()
    assert "A correction." in wanted
    between = 0
    for kill_at in range(1, int((tmp_path / "count").read_text()) + 1):
        shutil.rmtree(run)
        shutil.copytree(written, run)
        assert ended(start(caption, tmp_path / "log", watch=Watch(run, tmp_path / "count", kill_at))) == -signal.SIGKILL
        between += texts() == wanted and sheet() != known
        assert ended(start(caption, tmp_path / "log")) == 0
        assert (texts(), sheet()) == (wanted, known), kill_at
    assert between, "no kill came between the table and the sheet"


def test_a_killed_export_and_the_same_command_again_lose_nothing_and_double_nothing(films, tmp_path):
    folder, words = films
    # A third of each clip: every kill is answered by a whole export, and how long a clip is tells nothing more of it.
    table = folder / "short" / "clips.jsonl"
    table.parent.mkdir()
    rows = [json.loads(line) for line in (folder / "prepared" / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    table.write_text("".join(json.dumps(row | {"end": row["start"] + 0.5}) + "\n" for row in rows), encoding="utf-8")
    data = ("--data.clips", str(table), "--data.buckets", "[7x160x288]")
    export = ["export", *words[1:], *data, "--encode.read_ahead", "1"]

    def exported(into: Path) -> dict[str, bytes]:
        return {path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()}

    whole, run = tmp_path / "whole" / "set", tmp_path / "killed" / "set"  # the card has the folder's name
    assert ended(start([*export, str(whole)], tmp_path / "log", watch=Watch(whole, tmp_path / "count"))) == 0, (
        tmp_path / "log"
    ).read_text()
    wanted = exported(whole)
    assert len([name for name in wanted if name.startswith("clips/")]) == 2
    for kill_at in range(1, int((tmp_path / "count").read_text()) + 1):
        shutil.rmtree(run, ignore_errors=True)
        killed = ended(start([*export, str(run)], tmp_path / "log", watch=Watch(run, tmp_path / "count", kill_at)))
        assert killed == -signal.SIGKILL, kill_at
        assert ended(start([*export, str(run)], tmp_path / "log")) == 0, (kill_at, (tmp_path / "log").read_text()[-600:])
        assert exported(run) == wanted, kill_at
