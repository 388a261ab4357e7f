"""`mochi-lora encode`: every clip is kept or named with its reason, and running again goes on where it stopped."""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import datasets
import pytest
import torch
from footage import absurd
from tiny_commands import (
    EXAMPLES,
    config_of,
    count_of,
    entries_of,
    index_of,
    make_image,
    make_sound,
    make_video,
    mixed,
    report_of,
    settings,
)
from warm_processes import Place, ended, start, wait_until

import mochi_lora.commands.encode
from mochi_lora.cli import main
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import read_index, read_sample
from mochi_lora.data.prompts import CachedPrompts
from mochi_lora.errors import UserError
from mochi_lora.model.text import TextEncoder
from mochi_lora.model.vae import MochiVae

STILL = "1x32x48"
TEXTS = 8  # five captions, two prompts and the empty one


@pytest.fixture
def wide(monkeypatch):
    """A console wide enough for whole paths in tables."""
    monkeypatch.setattr("mochi_lora.console.console._width", 1000)


@pytest.fixture
def copied(tiny, small_clips, tmp_path):
    """(words, clips, cache) of two clips that a test may change."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for path in sorted(small_clips.glob("0[12]_*")):
        shutil.copy(path, clips)
    return settings(tiny, clips, tmp_path / "cache"), clips, tmp_path / "cache"


@pytest.fixture
def pictures(tiny, tmp_path):
    """(words, folder, cache) of a data set of pictures, which a test fills."""
    clips = tmp_path / "pictures"
    clips.mkdir()
    return settings(tiny, clips, tmp_path / "cache", STILL), clips, tmp_path / "cache"


@pytest.fixture
def loads(monkeypatch):
    """Names of the encoders loaded from here on, and captions embedded."""
    seen = []
    load_vae, load_text, embed = MochiVae.load, TextEncoder.load, TextEncoder.embed

    def embedding(encoder, captions):
        seen.extend(captions)
        return embed(encoder, captions)

    monkeypatch.setattr(MochiVae, "load", lambda *args, **options: (seen.append("vae"), load_vae(*args, **options))[1])
    monkeypatch.setattr(TextEncoder, "load", lambda *args, **options: (seen.append("text"), load_text(*args, **options))[1])
    monkeypatch.setattr(TextEncoder, "embed", embedding)
    return seen


def test_every_clip_becomes_a_sample_with_its_own_caption(encoded, small_clips):
    words, cache = encoded
    config = config_of(words)
    index = read_index(config.data)
    captions = {path.with_suffix(".mp4"): path.read_text().strip() for path in small_clips.glob("*.txt")}
    assert {Path(entry.clip): entry.caption for entry in index.entries} == captions
    assert [entry.split for entry in index.entries].count("validation") == 1
    for entry in index.entries:
        sample = read_sample(Cache(cache), entry)
        assert sample.posterior.mean.shape == (12, 2, 4, 6)
        assert sample.posterior.mean.float().std() > 0.1
        assert sample.text.length > 20


def test_prompts_are_embedded_for_training_the_null_prompt_too(encoded):
    words, cache = encoded
    config = config_of(words)
    prompts = CachedPrompts(Cache(cache), read_index(config.data))
    assert [prompts(prompt).length > 0 for prompt in config.sample.prompts] == [True, True]
    assert prompts("").length == 0


def test_running_again_encodes_nothing_and_changes_nothing(encoded, capsys, loads):
    words, cache = encoded
    index, entries = index_of(cache), entries_of(cache)
    assert main(["encode", *words]) == 0
    assert loads == []
    assert (index_of(cache), entries_of(cache)) == (index, entries)
    printed = capsys.readouterr().out
    counts = [count_of(row, printed) for row in ("kept", "of these trimmed", "of these already cached", "rejected")]
    assert counts == [4, 4, 4, 0]


def test_a_lost_index_is_rebuilt_without_encoding(encoded, tmp_path, loads, tiny, small_clips):
    cache = shutil.copytree(encoded[1], tmp_path / "cache")
    index = index_of(cache)
    shutil.rmtree(cache / "index")
    assert main(["encode", *settings(tiny, small_clips, cache)]) == 0
    assert loads == []
    assert index_of(cache) == index


def test_only_what_is_missing_is_encoded_again_and_comes_out_the_same(encoded, tmp_path, loads, tiny, small_clips):
    cache = shutil.copytree(encoded[1], tmp_path / "cache")
    gone = cache / "latents" / f"{index_of(cache)['entries'][2]['latents']}.safetensors"
    before = Cache(cache).read_latents(gone.stem)
    gone.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in cache.glob("latents/*")}
    assert main(["encode", *settings(tiny, small_clips, cache)]) == 0
    assert loads == ["vae"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert torch.equal(Cache(cache).read_latents(gone.stem).mean, before.mean)


def test_mending_a_caption_encodes_that_caption_and_no_video(copied, loads):
    words, clips, cache = copied
    assert main(["encode", *words]) == 0
    before = {entry["clip"]: entry for entry in index_of(cache)["entries"]}
    caption = next(iter(sorted(clips.glob("*.txt"))))
    caption.write_text("  a pink cloud over a meadow\n")
    loads.clear()
    assert main(["encode", *words]) == 0
    assert loads == ["text", "a pink cloud over a meadow"]
    after = {entry["clip"]: entry for entry in index_of(cache)["entries"]}
    mended, other = str(caption.with_suffix(".mp4")), str(sorted(clips.glob("*.mp4"))[1])
    assert after[other] == before[other]
    assert after[mended]["latents"] == before[mended]["latents"]
    assert after[mended]["text"] != before[mended]["text"]
    assert after[mended]["caption"] == "a pink cloud over a meadow"


def test_good_clips_are_kept_and_every_bad_one_is_named_with_its_reason(copied, capsys, wide):
    words, clips, cache = copied
    (clips / "empty.mp4").touch()
    (clips / "text.mp4").write_text("not a film")
    make_sound(clips / "sound.mp4")
    make_video(clips / "short.mp4", frames=3)
    whole = next(clips.glob("01_*.mp4")).read_bytes()
    (clips / "cut_off.mp4").write_bytes(whole[: len(whole) // 2])
    for path in clips.glob("*.mp4"):
        if not path.with_suffix(".txt").exists():
            path.with_suffix(".txt").write_text("a clip")
    make_video(clips / "no_caption.mp4", frames=7)
    make_video(clips / "blank_caption.mp4", frames=7).with_suffix(".txt").write_text(" \n")
    make_video(clips / "latin_caption.mp4", frames=7).with_suffix(".txt").write_bytes("schön".encode("latin-1"))
    expected = {
        "empty.mp4": "the file is empty",
        "text.mp4": "cannot be read as video",
        "sound.mp4": "holds no video, only audio",
        "short.mp4": "clip too short: has 0.100 s, 7 frames at 30 fps need",
        "cut_off.mp4": "the file is truncated",
        "no_caption.mp4": "no caption: write one into",
        "blank_caption.mp4": "is empty: write what the clip shows",
        "latin_caption.mp4": "is not UTF-8 (byte 3)",
    }
    assert main(["encode", *words]) == 0
    printed = capsys.readouterr().out
    report = report_of(cache)
    assert {name for name, line in report.items() if line["status"] == "rejected"} == set(expected)
    for name, reason in expected.items():
        assert reason in report[name]["reason"], name
        row = next(line for line in printed.splitlines() if f"{clips / name} " in line)
        assert reason in row
    good = {path.name for path in clips.glob("0*.mp4")}
    assert {name for name, line in report.items() if line["status"] == "trimmed"} == good
    assert {Path(entry["clip"]).name for entry in index_of(cache)["entries"]} == good
    assert (count_of("kept", printed), count_of("rejected", printed)) == (2, 8)


def test_when_nothing_can_be_kept_the_command_fails_and_leaves_no_index(pictures, capsys):
    words, clips, cache = pictures
    make_image(clips / "a.png", caption=None)
    (clips / "b.mp4").write_text("not a film")
    (clips / "b.txt").write_text("a clip")
    assert main(["encode", *words]) == 1
    assert "no clip could be used; the table above says why for each" in capsys.readouterr().err
    assert set(report_of(cache)) == {"a.png", "b.mp4"}
    assert [path.name for path in (cache / "index").iterdir() if not path.name.endswith(".report.jsonl")] == []


def test_captions_that_lose_something_are_named(pictures, capsys):
    words, clips, cache = pictures
    make_image(clips / "plain.png", "a red ball on green grass")
    make_image(clips / "long [bold] [/x].png", "a fox runs. " * 100, colour=90)
    make_image(clips / "half_foreign.png", "兔 a 兔 b 兔 c 兔 d", colour=120)
    make_image(clips / "foreign.png", "一只兔子在草地上奔跑", colour=150)
    assert main(["encode", *words]) == 0
    printed = capsys.readouterr().out
    assert f"1 captions cut at 256 tokens: {clips / 'long [bold] [/x].png'}" in printed.replace("\n", "")
    assert f"1 captions with more than 10% unknown tokens: {clips / 'half_foreign.png'}" in printed.replace("\n", "")
    rejected = {name: line for name, line in report_of(cache).items() if line["status"] == "rejected"}
    assert set(rejected) == {"foreign.png"}
    assert "every token is unknown to T5 (it knows English); translate it" in rejected["foreign.png"]["reason"]
    assert len(index_of(cache)["entries"]) == 3
    (long,) = [entry for entry in index_of(cache)["entries"] if "long" in entry["clip"]]
    assert Cache(cache).read_text(long["text"]).length == 256


def test_clips_and_pictures_take_the_bucket_that_fits_them(tiny, small_clips, tmp_path, capsys):
    clips, cache = tmp_path / "clips", tmp_path / "cache"
    clips.mkdir()
    for path in small_clips.glob("01_*"):
        shutil.copy(path, clips)
    make_video(clips / "tall.mp4", frames=13, height=48, width=32).with_suffix(".txt").write_text("tall")
    make_video(clips / "brief.mp4", frames=9).with_suffix(".txt").write_text("brief")
    make_image(clips / "still.png")
    assert main(["encode", *settings(tiny, clips, cache, "7x32x48, 13x32x48, 7x48x32, 1x32x48")]) == 0
    buckets = {name: line["bucket"] for name, line in report_of(cache).items()}
    film = next(clips.glob("01_*.mp4")).name
    assert buckets == {film: "13x32x48", "tall.mp4": "7x48x32", "brief.mp4": "7x32x48", "still.png": "1x32x48"}
    assert "1 x 13x32x48, 1 x 1x32x48, 1 x 7x32x48, 1 x 7x48x32" in capsys.readouterr().out
    for entry in read_index(config_of(settings(tiny, clips, cache, "7x32x48, 13x32x48, 7x48x32, 1x32x48")).data).entries:
        read_sample(Cache(cache), entry)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_table_may_take_several_ranges_of_one_film_and_keeps_them_on_one_side(tiny, tmp_path, form):
    rows = [(EXAMPLES / "01_cloud_and_meadow.mp4", start, start + 0.5, f"clouds {start}") for start in (0.0, 0.5, 1.0)]
    rows.append((EXAMPLES / "04_stretching.mp4", None, None, "a rabbit, stretching"))
    table = tmp_path / f"clips.{form}"
    if form == "csv":
        lines = ["file_name,start,end,text", *(f'{path},{start or ""},{end or ""},"{text}"' for path, start, end, text in rows)]
    else:
        keys = ("file_name", "start", "end", "text")
        lines = [json.dumps(dict(zip(keys, (str(row[0]), *row[1:]), strict=True))) for row in rows]
    table.write_text("\n".join(lines) + "\n")
    cache = tmp_path / "cache"
    assert main(["encode", *settings(tiny, table, cache), "--data.validation_fraction", "0.5"]) == 0
    entries = index_of(cache)["entries"]
    assert sorted(entry["caption"] for entry in entries) == ["a rabbit, stretching", "clouds 0.0", "clouds 0.5", "clouds 1.0"]
    assert len({entry["latents"] for entry in entries}) == 4
    sides = {"clouds": set(), "a rabb": set()}
    for entry in entries:
        sides[entry["caption"][:6]].add(entry["split"])
    assert sorted(map(sorted, sides.values())) == [["train"], ["validation"]]


def test_a_datasets_folder_gives_the_same_samples_as_the_files_in_it(tiny, tmp_path, encoded):
    sources = sorted(EXAMPLES.glob("0[12]_*.mp4"))
    table = datasets.Dataset.from_dict(
        {
            "clip": [{"path": path.name, "bytes": path.read_bytes()} for path in sources],
            "text": [path.with_suffix(".txt").read_text() for path in sources],
        },
        features=datasets.Features({"clip": datasets.Video(decode=False), "text": datasets.Value("string")}),
    )
    table.save_to_disk(tmp_path / "saved")
    assert main(["encode", *settings(tiny, tmp_path / "saved", tmp_path / "cache")]) == 0
    found = {(entry["latents"], entry["text"]) for entry in index_of(tmp_path / "cache")["entries"]}
    assert found == {(entry["latents"], entry["text"]) for entry in index_of(encoded[1])["entries"][:2]}


def test_another_vae_precision_makes_entries_of_its_own(copied):
    words, _, cache = copied
    assert main(["encode", *words]) == 0
    before = index_of(cache)
    assert main(["encode", *words, "--encode.vae_precision", "bf16"]) == 0
    after = index_of(cache)
    assert after["vae"] == {**before["vae"], "precision": "bf16"}
    assert not {entry["latents"] for entry in before["entries"]} & {entry["latents"] for entry in after["entries"]}
    assert len(list((cache / "latents").iterdir())) == 4


def test_a_full_disk_ends_the_run_with_its_path_and_no_index(copied, capsys, monkeypatch):
    words, _, cache = copied

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mochi_lora.files.os.fsync", full)
    assert main(["encode", *words]) == 1
    assert f"error: {cache / 'latents'}" in capsys.readouterr().err
    assert not (cache / "index").exists()


def test_a_damaged_vae_ends_the_run_instead_of_shrinking_the_data_set(copied, capsys, monkeypatch):
    words, clips, cache = copied
    assert main(["encode", *words]) == 0
    before = index_of(cache)
    make_video(clips / "new.mp4", frames=7).with_suffix(".txt").write_text("new")

    def load(*_, **__):
        raise UserError("vae/diffusion_pytorch_model.safetensors: damaged")

    monkeypatch.setattr(MochiVae, "load", load)
    assert main(["encode", *words]) == 1
    assert "error: vae/diffusion_pytorch_model.safetensors: damaged" in capsys.readouterr().err
    assert index_of(cache) == before


def test_ctrl_c_keeps_what_is_done(copied, monkeypatch):
    words, _, cache = copied
    read, seen = MochiVae.encode, []

    def encode_one(vae, pixels):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return read(vae, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(MochiVae, "encode", encode_one)
        assert main(["encode", *words]) == 130
    (done,) = (cache / "latents").iterdir()
    stamp = done.stat().st_mtime_ns
    assert main(["encode", *words]) == 0
    assert done.stat().st_mtime_ns == stamp
    assert len(index_of(cache)["entries"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["encode"], ["sample", "--base-only"], ["inspect", "--decode", "1"]])
def test_asking_for_a_gpu_that_is_not_there_says_so(encoded, command, capsys, tmp_path):
    output = ["--output", str(tmp_path / "out")] if command[0] != "encode" else []
    assert main([*command, *encoded[0], *output, "--engine.device", "cuda"]) == 1
    assert "engine.device: cuda was asked for, but torch sees no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_never_killed(tiny, tmp_path):
    """SIGKILL as soon as the first entry is there; a torn draft of the second is laid beside it."""
    buckets = "19x64x112"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    log = tmp_path / "log"
    assert ended(start(["encode", *settings(tiny, EXAMPLES, whole, buckets)], log)) == 0, log.read_text()
    words = ["encode", *settings(tiny, EXAMPLES, killed, buckets)]
    run = start(words, log)
    wait_until(lambda: not run.is_alive() or list(killed.glob("latents/*.safetensors")))
    run.kill()
    assert ended(run) == -signal.SIGKILL
    done = list(killed.glob("latents/*.safetensors"))
    assert len(done) < 8, "the run was over before the kill: nothing was proven"
    missing = next(path for path in whole.glob("latents/*") if not (killed / "latents" / path.name).exists())
    torn = killed / "latents" / f"{missing.name}.tmp-1-0"
    torn.write_bytes(missing.read_bytes()[:100])
    stamps = {path: path.stat().st_mtime_ns for path in done}
    assert ended(start(words, log)) == 0, log.read_text()
    assert {path: path.stat().st_mtime_ns for path in done} == stamps
    assert index_of(killed)["entries"] == index_of(whole)["entries"]
    assert len(index_of(killed)["entries"]) == 8
    for entry in index_of(whole)["entries"]:
        ours, theirs = (Cache(root).read_latents(entry["latents"]) for root in (killed, whole))
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.logvar, theirs.logvar)
        assert torch.equal(*(Cache(root).read_text(entry["text"]).tokens for root in (killed, whole)))


@pytest.mark.slow
def test_two_processes_share_the_work_and_leave_the_same_index_as_one(tiny, tmp_path, small_clips, encoded):
    cache, clips = tmp_path / "cache", small_clips
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words, logs = ["encode", *settings(tiny, clips, cache)], [tmp_path / f"rank{rank}.log" for rank in range(2)]
    both = [start(words, log, place=Place(rank, 2, port)) for rank, log in enumerate(logs)]
    assert [ended(process) for process in both] == [0, 0], "".join(log.read_text() for log in logs)
    told = logs[0].read_text()
    assert index_of(cache) == index_of(encoded[1])
    assert count_of("kept", told) == 4
    assert count_of("of these already cached", told) == 0
    assert "of these already cached" not in logs[1].read_text(), "only the main process talks"
    for entry in index_of(cache)["entries"]:
        ours, theirs = (Cache(root).read_latents(entry["latents"]).mean for root in (cache, encoded[1]))
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def _look_late():
    """Rank 1 lists the clips when rank 0 has and two more have come, and looks for texts when rank 0 has written its share."""
    first, holds, listed = os.environ["RANK"] == "0", Cache.holds, mochi_lora.commands.encode.list_part

    def holding(cache, kind, key):
        if kind == "text" and not first:
            wait_until(lambda: len(list(cache.root.glob("text/*.safetensors"))) >= TEXTS // 2)
        return holds(cache, kind, key)

    def listing(part, data):
        ready = part.clips / "listed"
        if not first:
            wait_until(ready.exists)
            for name in ("00", "9"):
                make_image(part.clips / f"{name}.png", "late")
        found = listed(part, data)
        ready.touch()
        return found

    Cache.holds, mochi_lora.commands.encode.list_part = holding, listing


@pytest.mark.slow
def test_a_process_that_looks_late_loses_no_clip_and_no_caption(tiny, pictures, tmp_path):
    words, clips, cache = pictures
    for number in range(5):
        make_image(clips / f"{number}.png", f"a ball, number {number}", colour=40 * number)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    both = [start(["encode", *words], log, place=Place(rank, 2, port), before=_look_late) for rank, log in enumerate(logs)]
    assert [ended(process) for process in both] == [0, 0], "".join(log.read_text() for log in logs)
    entries = index_of(cache)["entries"]
    assert [entry["caption"] for entry in entries] == [f"a ball, number {number}" for number in range(5)]
    assert all(Cache(cache).holds("text", entry["text"]) for entry in entries)
    assert len(list(cache.glob("text/*.safetensors"))) == TEXTS


# --- several parts ------------------------------------------------------------------------------------------------------


def test_parts_are_encoded_with_their_own_settings_and_named_in_the_index(tiny, tmp_path, capsys):
    for part in ("chalk", "plain"):
        for number in range(3):
            make_image(tmp_path / part / f"{number}.png", f"a ball {number}", colour=80 * number + len(part))
    mix = [
        {"clips": str(tmp_path / "chalk"), "repeats": 4, "trigger": "chalk style"},
        {"clips": str(tmp_path / "plain"), "buckets": ["1x16x16"]},
    ]
    words = mixed(tiny, tmp_path / "cache", mix, STILL)
    assert main(["encode", *words]) == 0
    entries = index_of(tmp_path / "cache")["entries"]
    assert [(entry["part"], entry["bucket"], entry["caption"]) for entry in entries] == [
        *((0, "1x32x48", f"chalk style, a ball {number}") for number in range(3)),
        *((1, "1x16x16", f"a ball {number}") for number in range(3)),
    ]
    drawn = capsys.readouterr().out.split("an epoch")[1]
    assert "4 times" in drawn
    assert "1 times" in drawn
    index = index_of(tmp_path / "cache")
    assert main(["encode", *words]) == 0
    assert index_of(tmp_path / "cache") == index


def test_a_video_is_on_one_side_in_whatever_tables_and_under_whatever_names_it_stands(tiny, tmp_path):
    """Twelve films; each is in two parts: once as it is, once as a copy with another name and range, or as a named cut."""
    folder, tables = tmp_path / "films", [[], []]
    folder.mkdir()
    for number in range(12):
        film = make_video(folder / f"{number:02}.mp4", frames=24)
        tables[0].append({"file_name": film.name, "text": f"film {number:02}", "end": 0.3})
        if number % 2:
            shutil.copy(film, folder / f"copy-{number:02}.mp4")
            tables[1].append({"file_name": f"copy-{number:02}.mp4", "text": f"film {number:02} later", "start": 0.4})
        else:
            cut = make_video(folder / f"cut-{number:02}.mp4", frames=7)
            source = hashlib.sha256(film.read_bytes()).hexdigest()
            tables[1].append({"file_name": cut.name, "text": f"film {number:02} later", "source": source})
    for place, rows in enumerate(tables):
        (folder / f"{place}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = [{"clips": str(folder / "0.jsonl")}, {"clips": str(folder / "1.jsonl")}]
    assert main(["encode", *mixed(tiny, tmp_path / "cache", mix), "--data.validation_fraction", "0.4"]) == 0
    sides: dict[str, set[str]] = {}
    for entry in index_of(tmp_path / "cache")["entries"]:
        sides.setdefault(entry["caption"][:7], set()).add(entry["split"])
    assert len(sides) == 12
    assert all(len(side) == 1 for side in sides.values()), sides
    assert sum(side == {"validation"} for side in sides.values()) == 5


def test_when_everything_is_one_video_it_is_said_that_nothing_is_held_out(tiny, tmp_path, capsys):
    film = make_video(tmp_path / "film.mp4", frames=30)
    rows = [{"file_name": film.name, "text": "x", "start": start} for start in (0.0, 0.3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["encode", *settings(tiny, tmp_path / "t.jsonl", tmp_path / "cache")]) == 0
    assert "all clips come from one video: none is held out" in capsys.readouterr().out


def _ranges(folder, counts):
    """A table of so many clips of each of several films."""
    films = [make_video(folder / f"film-{number}.mp4", frames=9 * count) for number, count in enumerate(counts)]
    rows = [
        {"file_name": film.name, "text": "x", "start": 0.3 * place, "end": 0.3 * place + 0.25}
        for film, count in zip(films, counts, strict=True)
        for place in range(count)
    ]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "t.jsonl"


def test_a_film_of_most_clips_is_trained_on_and_the_split_is_told(tiny, tmp_path, capsys):
    words = [*settings(tiny, _ranges(tmp_path, (12, 1)), tmp_path / "cache"), "--data.validation_fraction", "0.4"]
    told = "1 clip of 1 video held out for the validation loss, 12 clips of 1 video to train on"
    warning = "data.validation_fraction 0.4 asks for 5 clips, and videos are held out whole: it is 8% of the clips"
    assert main(["encode", "--plan", *words]) == 0
    planned = capsys.readouterr().out
    assert main(["encode", *words]) == 0
    encoded = capsys.readouterr().out
    assert f"split    about {told}" in planned
    assert f"split    {told}" in encoded
    assert warning in planned
    assert warning in encoded
    splits = [entry["split"] for entry in index_of(tmp_path / "cache")["entries"]]
    assert splits == ["train"] * 12 + ["validation"]


def test_a_split_that_comes_near_the_fraction_is_told_without_a_warning(tiny, tmp_path, capsys):
    words = [*settings(tiny, _ranges(tmp_path, (1, 1, 2)), tmp_path / "cache"), "--data.validation_fraction"]
    assert main(["encode", *words, "0.3"]) == 0
    told = capsys.readouterr().out
    assert "split    1 clip of 1 video held out for the validation loss, 3 clips of 2 videos to train on" in told
    assert "asks for" not in told
    assert main(["encode", *words, "0"]) == 0
    assert "held out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "is_said"),
    [
        ([{}, {}], True),
        ([{"source": "film.mp4"}, {"source": "film.mp4"}], False),
        ([{"end": 0.25}, {"start": 0.3}], False),  # ranges: the file is the video
        ([{"source": "film.mp4"}, {}, {}], True),  # one that is named does not speak for the others
        ([{"source": "film.mp4"}, {}], False),
    ],
)
def test_whole_files_that_name_no_source_are_said_to_be_split_each_for_itself(tiny, tmp_path, capsys, rows, is_said):
    for number, row in enumerate(rows):
        row |= {"file_name": make_video(tmp_path / f"{number}.mp4", frames=20).name, "text": "x"}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = settings(tiny, tmp_path / "t.jsonl", tmp_path / "cache")
    for command in (["encode", "--plan"], ["encode"]):
        assert main([*command, *words]) == 0
        said = "2 clips are whole files, and none names its source"
        assert (said in " ".join(capsys.readouterr().out.split())) == is_said
        assert main([*command, *words, "--data.validation_fraction", "0"]) == 0
        assert said not in " ".join(capsys.readouterr().out.split())


def test_a_name_that_is_not_utf_8_is_one_refused_clip(tiny, tmp_path, capsys):
    """No table could hold it, and the console could not print it."""
    for name in ("good", "other"):
        make_video(tmp_path / "clips" / f"{name}.mp4", frames=20).with_suffix(".txt").write_text("a dog")
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "clips") + b"/caf\xe9.mp4"))
    odd.write_bytes((tmp_path / "clips" / "good.mp4").read_bytes())
    odd.with_suffix(".txt").write_text("a cat")
    words = settings(tiny, tmp_path / "clips", tmp_path / "cache")
    for command in (["encode", "--plan"], ["encode"]):
        assert main([*command, *words]) == 0
        assert "not UTF-8; rename it" in " ".join(capsys.readouterr().out.split())
    refused = [line for line in report_of(tmp_path / "cache").values() if line["status"] == "rejected"]
    assert [line["clip"].endswith("caf\\xe9.mp4") for line in refused] == [True]
    assert len(index_of(tmp_path / "cache")["entries"]) == 2


# --- many ---------------------------------------------------------------------------------------------------------------


def _spoiled(path: Path, how: int) -> str:
    """Make the good clip at `path` a bad one; returns a word of the reason that is expected."""
    content = path.read_bytes()
    match how % 6:
        case 0:
            path.write_bytes(b"")
            return "empty"
        case 1:
            path.write_bytes(content[: len(content) // 2])
            return "truncated"
        case 2:
            path.write_bytes(bytes(range(256)) * 8)
            return "cannot be read"
        case 3:
            make_sound(path)
            return "holds no video"
        case 4:
            path.write_bytes(absurd(content))
            return "annot allocate memory"
        case _:
            path.with_suffix(".txt").unlink()
            return "no caption"


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory):
    """(folder, expected reason by name of the bad ones): every eighth of 200 clips is bad."""
    folder, bad = tmp_path_factory.mktemp("many") / "clips", {}
    folder.mkdir()
    for number in range(200):
        path = make_video(folder / f"{number:03}.mp4", frames=7)
        path.with_suffix(".txt").write_text(f"noise {number % 10}")
        if number % 8 == 3:
            bad[path.name] = _spoiled(path, number // 8)
    assert len(bad) == 25
    return folder, bad


@pytest.mark.slow
def test_of_two_hundred_clips_the_bad_ones_are_listed_and_all_others_come_through(tiny, two_hundred, tmp_path):
    clips, bad = two_hundred
    assert main(["encode", *settings(tiny, clips, tmp_path / "cache")]) == 0
    report = report_of(tmp_path / "cache")
    assert len(report) == 200
    rejected = {name: line["reason"] for name, line in report.items() if line["status"] == "rejected"}
    assert rejected.keys() == bad.keys()
    assert all(word in rejected[name] for name, word in bad.items())
    entries = index_of(tmp_path / "cache")["entries"]
    assert {Path(entry["clip"]).name for entry in entries} == report.keys() - bad.keys()
    assert len({entry["latents"] for entry in entries}) == 175


@pytest.mark.slow
def test_kills_in_the_middle_of_two_hundred_clips_lose_none_and_encode_none_twice(tiny, two_hundred, tmp_path):
    """SIGKILL twice at growing numbers of entries; entries that are there are never written again."""
    clips, bad = two_hundred
    cache, stamps = tmp_path / "cache", {}
    for goal in (20, 110):
        run = start(["encode", *settings(tiny, clips, cache)], tmp_path / "log")
        wait_until(lambda run=run, goal=goal: not run.is_alive() or len(list(cache.glob("latents/*.safetensors"))) >= goal)
        run.kill()
        assert ended(run) == -signal.SIGKILL, (tmp_path / "log").read_text()
        done = {path: path.stat().st_mtime_ns for path in cache.glob("latents/*.safetensors")}
        assert goal <= len(done) < 175, "the run was over before the kill: nothing was proven"
        assert stamps.items() <= done.items()
        stamps = done
    assert main(["encode", *settings(tiny, clips, cache)]) == 0
    assert stamps.items() <= {path: path.stat().st_mtime_ns for path in cache.glob("latents/*.safetensors")}.items()
    entries = index_of(cache)["entries"]
    names = [Path(entry["clip"]).name for entry in entries]
    assert len(names) == len(set(names)) == 175
    assert not set(names) & set(bad)
    assert sum(line["status"] == "rejected" for line in report_of(cache).values()) == 25
