"""`mochi-lora inspect`: every entry is checked, damage is named, and samples can be looked at."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_commands import config_of, frames_of, index_of, settings

from mochi_lora.cli import main
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import read_index, write_index


@pytest.fixture
def copied(encoded, tmp_path, tiny, small_clips):
    """(words, cache) of an encoded data set that a test may damage."""
    cache = shutil.copytree(encoded[1], tmp_path / "cache")
    return settings(tiny, small_clips, cache), cache


@pytest.fixture
def wide(monkeypatch):
    """A console wide enough for whole paths in tables."""
    monkeypatch.setattr("mochi_lora.console.console._width", 1000)


def test_every_sample_is_in_the_table(encoded, capsys, wide):
    words, cache = encoded
    assert main(["inspect", *words]) == 0
    printed = capsys.readouterr().out
    for entry in read_index(config_of(words).data).entries:
        row = next(line for line in printed.splitlines() if f"{entry.clip} " in line)
        tokens = Cache(cache).read_text(entry.text).length
        assert [cell.strip() for cell in row.split("│")][1:5] == [entry.clip, "7x32x48", entry.split, str(tokens)]
        assert entry.caption[:60] in row
    assert "4 samples (4 x 7x32x48)" in printed
    assert "0 damaged" in printed


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_entry_is_named_and_the_others_are_still_shown(copied, capsys, wide, kind):
    words, cache = copied
    entries = index_of(cache)["entries"]
    path = cache / kind / f"{entries[1][kind]}.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    assert main(["inspect", *words]) == 1
    told = capsys.readouterr()
    assert "error: 1 damaged entries:" in told.err
    assert f"  {path}: damaged cache entry" in told.err
    shown = [entry["clip"] in told.out for entry in entries]
    assert shown == [True, False, True, True]
    assert "1 damaged" in told.out


def test_missing_entries_are_all_named(copied, capsys):
    words, cache = copied
    gone = [cache / "latents" / f"{entry['latents']}.safetensors" for entry in index_of(cache)["entries"][:2]]
    for path in gone:
        path.unlink()
    assert main(["inspect", *words]) == 1
    told = capsys.readouterr().err
    assert "error: 2 damaged entries:" in told
    assert all(f"  {path}: the index names this cache entry but it is not there" in told for path in gone)


def test_an_entry_of_another_shape_than_the_index_says_is_damaged(copied, capsys):
    """Training refuses it, so inspecting must find it first."""
    words, _ = copied
    data = config_of(words).data
    index = read_index(data)
    wrong = replace(index.entries[0], bucket="13x32x48")
    write_index(data, replace(index, entries=(wrong, *index.entries[1:])))
    assert main(["inspect", *words]) == 1
    assert f"{wrong.latents}.safetensors: latents of shape (12, 2, 4, 6), expected (12, 3, 4, 6)" in capsys.readouterr().err


def test_decoded_samples_are_the_clips_as_training_sees_them(encoded, tmp_path, capsys):
    words, _ = encoded
    output = tmp_path / "decoded"
    assert main(["inspect", *words, "--decode", "3", "--output", str(output)]) == 0
    videos = sorted(output.glob("*.mp4"))
    clips = [Path(entry.clip).stem for entry in read_index(config_of(words).data).entries]
    assert [video.name for video in videos] == [
        f"{number:03d}-{clip.replace('_', '-')}-seed0.mp4" for number, clip in enumerate(clips[:3])
    ]
    assert {frames_of(video).shape for video in videos} == {(7, 32, 48, 3)}
    assert not np.array_equal(frames_of(videos[0]), frames_of(videos[1]))
    assert Image.open(output / "sheet.png").height > 3 * 100
    printed = capsys.readouterr().out
    assert all(str(video) in printed for video in videos)


def test_without_output_decoded_samples_lie_beside_the_cache(copied):
    words, cache = copied
    assert main(["inspect", *words, "--decode", "1"]) == 0
    assert len(list((cache / "decoded").glob("*.mp4"))) == 1


def test_more_samples_than_there_are_is_all_of_them(copied):
    words, cache = copied
    assert main(["inspect", *words, "--decode", "99"]) == 0
    assert len(list((cache / "decoded").glob("*.mp4"))) == 4


def test_a_damaged_entry_does_not_keep_the_others_from_being_decoded(copied, capsys):
    words, cache = copied
    path = cache / "latents" / f"{index_of(cache)['entries'][0]['latents']}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["inspect", *words, "--decode", "2"]) == 1
    assert "error: 1 damaged entries:" in capsys.readouterr().err
    assert sorted(video.name[:6] for video in (cache / "decoded").glob("*.mp4")) == ["000-02", "001-03"]


def test_a_data_set_that_was_never_encoded_says_what_to_run(tiny, small_clips, tmp_path, capsys):
    assert main(["inspect", *settings(tiny, small_clips, tmp_path / "cache")]) == 1
    assert "run `mochi-lora encode` with this configuration first" in capsys.readouterr().err
