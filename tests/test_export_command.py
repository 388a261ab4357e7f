"""`mochi-lora export`: a data set goes out and comes back as the same latents, also on the other side of `datasets`."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from footage import make_clip
from tiny_commands import entries_of, index_of, make_image, mixed, settings

from mochi_lora.cli import main

BUCKETS = "13x32x64, 1x32x64"


@pytest.fixture
def films(tmp_path):
    """Two films and a picture, and a table of three ranges, one cropped."""
    folder = tmp_path / "films"
    folder.mkdir()
    for name, rate in (("one", "25"), ("two", "30000/1001"), ("three", "30")):
        make_clip(folder / f"{name}.mp4", frames=60, rate=rate)
    make_image(folder / "still.png")
    rows = [
        {"file_name": "one.mp4", "text": "first", "start": 0.31, "end": 0.9},
        {"file_name": "one.mp4", "text": "second", "start": 1.0, "end": 2.0, "crop": [1, 3, 101, 60]},
        {"file_name": "two.mp4", "text": "third", "start": 0.5, "end": None},
        {"file_name": "three.mp4", "text": "a whole film"},
        {"file_name": "still.png", "text": "a still"},
        {"file_name": "one.mp4", "text": "too short", "start": 2.5, "end": 3.0},
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "clips.jsonl"


def _lines(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_an_export_encodes_to_the_same_latents_bit_for_bit(tiny, films, tmp_path):
    words, out = settings(tiny, films, tmp_path / "cache", BUCKETS), tmp_path / "out"
    assert main(["export", *words, str(out)]) == 0
    again = settings(tiny, out, tmp_path / "again", BUCKETS)
    for command in (words, again):
        assert main(["encode", *command, "--data.validation_fraction", "0.3"]) == 0
    ours, theirs = ({entry["caption"]: entry for entry in index_of(tmp_path / name)["entries"]} for name in ("cache", "again"))
    assert ours.keys() == theirs.keys() == {"first", "second", "third", "a whole film", "a still"}
    files = entries_of(tmp_path / "cache"), entries_of(tmp_path / "again")
    for caption, entry in ours.items():
        one, other = (
            found[f"latents/{which[caption]['latents']}.safetensors"]
            for found, which in zip(files, (ours, theirs), strict=True)
        )
        sizes = [int.from_bytes(content[:8], "little") for content in (one, other)]
        assert one[8 + sizes[0] :] == other[8 + sizes[1] :], caption
        assert entry["bucket"] == theirs[caption]["bucket"]
    for entries in (ours, theirs):  # two files now, one video still
        assert entries["first"]["split"] == entries["second"]["split"]
    assert theirs["first"]["source_sha256"] != theirs["second"]["source_sha256"]


def test_the_table_names_no_path_of_ours_and_the_bad_clip_is_told(tiny, films, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", *settings(tiny, films, tmp_path / "cache", BUCKETS), str(out)]) == 0
    lines = _lines(out)
    assert {line["text"] for line in lines} == {"first", "second", "third", "a whole film", "a still"}
    assert all(line.keys() == {"file_name", "text", "start", "source"} for line in lines)
    assert str(tmp_path) not in (out / "metadata.jsonl").read_text() + (out / "README.md").read_text()
    assert sorted(line["file_name"] for line in lines) == sorted(f"clips/{path.name}" for path in (out / "clips").iterdir())
    printed = capsys.readouterr().out
    assert "clip too short" in printed
    assert "5 clips" in printed
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\n")
    assert "5 captioned clips, 4 videos and 1 images" in card


def test_a_second_run_completes_what_a_first_left_and_keeps_the_card(tiny, films, tmp_path):
    words, out = ["export", *settings(tiny, films, tmp_path / "cache", BUCKETS), str(tmp_path / "out")], tmp_path / "out"
    assert main(words) == 0
    table = (out / "metadata.jsonl").read_bytes()
    whole = {path: path.read_bytes() for path in (out / "clips").iterdir()}
    gone, torn = sorted(whole)[:2]
    gone.unlink()
    (out / "metadata.jsonl").unlink()
    (out / "README.md").write_text("mine")
    torn.with_name(f"{torn.name}.tmp-1-0").write_bytes(b"half")
    stamps = {path: path.stat().st_mtime_ns for path in whole if path != gone}
    assert main(words) == 0
    assert {path: path.read_bytes() for path in (out / "clips").iterdir()} == whole
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (out / "metadata.jsonl").read_bytes() == table
    assert (out / "README.md").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(tiny, films, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    assert main(["export", *settings(tiny, films, tmp_path / "cache", BUCKETS), str(tmp_path / "out")]) == 1
    assert "holds thesis.doc, which is not of an export; name a new folder" in capsys.readouterr().err


def test_triggers_of_a_mix_are_exported_with_the_captions(tiny, films, tmp_path):
    words = mixed(tiny, tmp_path / "cache", [{"clips": str(films), "trigger": "chalk"}], BUCKETS)
    assert main(["export", *words, str(tmp_path / "out")]) == 0
    assert {line["text"] for line in _lines(tmp_path / "out")} >= {"chalk, first", "chalk, a still"}


_LOAD = """
import sys, datasets
found = datasets.load_dataset("videofolder", data_dir=sys.argv[1], split="train", drop_labels=True)
found = found.cast_column("video", datasets.Video(decode=False))
print(sorted(found["text"]), found.column_names)
found.save_to_disk(sys.argv[2])
"""


@pytest.mark.slow
def test_datasets_reads_an_export_as_a_video_folder_and_what_it_saves_comes_back(tiny, films, tmp_path):
    rows = [line for line in films.read_text().splitlines() if "still" not in line]  # a video folder holds videos
    films.write_text("\n".join(rows))
    out, saved = tmp_path / "out", tmp_path / "saved"
    assert main(["export", *settings(tiny, films, tmp_path / "cache", BUCKETS), str(out)]) == 0
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(out), str(saved)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "['a whole film', 'first', 'second', 'third']" in done.stdout
    shutil.rmtree(out)
    words = settings(tiny, saved, tmp_path / "again", BUCKETS)
    assert main(["encode", *words]) == 0
    assert main(["encode", *settings(tiny, films, tmp_path / "cache", BUCKETS)]) == 0
    ours, theirs = ({entry["caption"]: entry for entry in index_of(tmp_path / name)["entries"]} for name in ("cache", "again"))
    assert ours.keys() == theirs.keys()
    assert ours["first"]["bucket"] == theirs["first"]["bucket"]
    assert theirs["first"]["split"] == theirs["second"]["split"]
