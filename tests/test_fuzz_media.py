"""Damaged files of every kind of container, and pictures of odd sizes: the outcome is frames, a survey, or a `ClipError`, in
bounded time and memory."""

import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from footage import H264, absurd, hdr, make_clip, make_interlaced
from PIL import ExifTags, Image
from scenes import scene, write

VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "400k")
WOVEN = (*H264, "-x264-params", "tff=1")
MAKERS: dict[str, Callable[[Path], Path]] = {
    "a.mp4": lambda path: make_clip(path, codec=(*H264, "-movflags", "+faststart")),
    "a.mkv": make_clip,
    "a.ts": make_clip,
    "a.webm": lambda path: make_clip(path, codec=VP9),
    "hdr.mp4": lambda path: make_clip(path, frames=12, codec=hdr("smpte2084")),
    "woven.ts": lambda path: make_interlaced(path, "tff", WOVEN, frames=24),
    "stretched.mkv": lambda path: make_clip(path, codec=(*H264, "-vf", "setsar=4/3")),
    "odd.mkv": lambda path: _sized(path, 47, 33),
    "small.mkv": lambda path: _sized(path, 17, 19),
    "tiny.mp4": lambda path: _sized(path, 8, 8),
    "flat.mp4": lambda path: _sized(path, 256, 15),
    "thin.mkv": lambda path: _sized(path, 12, 400),
}
PICTURES = ("a.jpg", "a.png", "a.webp")
NOT_SURVEYED = ("tiny.mp4", "flat.mp4", "thin.mkv", *PICTURES)
ONE_BY_ONE = Path(__file__).with_name("read_in_children.py")


def _sized(path: Path, width: int, height: int) -> Path:
    """Without the halving of colour, sides may be odd."""
    codec = ("-c:v", "libx264", "-pix_fmt", "yuv444p", "-preset", "ultrafast", "-g", "12")
    return write(path, scene(1, 24, size=(width, height), detail=4), rate="30", codec=codec)


def _picture(path: Path) -> Path:
    """With the EXIF that a camera writes."""
    exif = Image.Exif()
    exif.update({271: "Maker", 272: "Model", 274: 6, 282: 72.0, 283: 72.0, 296: 2, 306: "2020:01:01 00:00:00", 531: 1})
    exif.get_ifd(ExifTags.IFD.Exif).update({33434: 0.01, 33437: 2.0, 36867: "2020:01:01 00:00:00", 37500: b"a note"})
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (1.0, 2.0, 3.0)})
    Image.fromarray(scene(1, 1, size=(64, 48), detail=4)[0]).save(path, exif=exif)
    return path


Mutation = Callable[[bytearray, np.random.Generator], bytearray]


def _flipped(content: bytearray, rng: np.random.Generator) -> bytearray:
    for place in rng.integers(0, len(content), rng.integers(1, 30)):
        content[place] ^= 1 << int(rng.integers(8))
    return content


def _flipped_head(content: bytearray, rng: np.random.Generator) -> bytearray:
    """The first 2 KiB, where containers describe themselves."""
    return _flipped(content[:2048], rng) + content[2048:]


def _noise(content: bytearray, rng: np.random.Generator) -> bytearray:
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 600))
    content[start : start + length] = rng.bytes(min(length, len(content) - start))
    return content


def _zeros(content: bytearray, rng: np.random.Generator) -> bytearray:
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 2000))
    content[start : start + length] = bytes(min(length, len(content) - start))
    return content


def _cut(content: bytearray, rng: np.random.Generator) -> bytearray:
    return content[: int(rng.integers(1, len(content)))]


def _gap(content: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(content)))
    return content[:start] + content[start + int(rng.integers(1, 1000)) :]


def _twice(content: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(content)))
    return content[: start + int(rng.integers(1, 1000))] + content[start:]


def _huge_numbers(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Sizes and counts of four bytes in the head become as large as they can be."""
    for place in rng.integers(0, min(2044, len(content)), 3):
        content[place : place + 4] = bytes([255, 255, 255, 240])
    return content


def _odd_exif(content: bytearray, rng: np.random.Generator) -> bytearray:
    """A field of EXIF said to be of another type, and odd bytes behind the header; pixels and a PNG's checksum stay whole."""
    exif = max(content.find(b"II*\0"), content.find(b"MM\0*"))
    order: Literal["little", "big"] = "little" if content[exif : exif + 1] == b"I" else "big"
    field = exif + 10 + 12 * int(rng.integers(7))
    content[field + 2 : field + 4] = int(rng.integers(1, 13)).to_bytes(2, order)
    for place in rng.integers(exif + 8, exif + 260, rng.integers(3)):
        content[place] = int(rng.integers(256))
    if (chunk := content.find(b"eXIf")) > 0:
        end = chunk + 4 + int.from_bytes(content[chunk - 4 : chunk])
        content[end : end + 4] = zlib.crc32(content[chunk:end]).to_bytes(4)
    return content


MUTATIONS: tuple[Mutation, ...] = (_flipped, _flipped_head, _noise, _zeros, _cut, _gap, _twice, _huge_numbers)


def _outcomes(
    folder: Path, names: list[str], rounds: int, mutations: tuple[Mutation, ...] = MUTATIONS
) -> dict[str, tuple[str, str]]:
    """(what reading, what surveying came to) by file: the undamaged ones, and `rounds` mutants of each."""
    files = []
    for name in names:
        whole = MAKERS.get(name, _picture)(folder / name)
        files.append(whole)
        content = whole.read_bytes()
        mutants = {
            f"{turn:02}{mutations[turn % len(mutations)].__name__}_{name}": _mutant(name, content, turn, mutations)
            for turn in range(rounds)
        }
        if whole.suffix == ".mp4":
            mutants[f"absurd_{name}"] = absurd(content)
        for mutant, damaged in mutants.items():
            files.append(folder / mutant)
            files[-1].write_bytes(damaged)
    listed = "".join(f"{file}\n" for file in files)
    limited = {
        **os.environ,
        "MALLOC_ARENA_MAX": "2",
    }  # each thread's own would count against the limit on a machine of many cores
    done = subprocess.run([sys.executable, ONE_BY_ONE], input=listed, capture_output=True, text=True, env=limited)
    assert done.returncode == 0, done.stderr
    said = {file: (read, surveyed) for file, read, surveyed in map(json.loads, done.stdout.splitlines())}
    assert sorted(said) == sorted(map(str, files))
    return {Path(file).name: outcomes for file, outcomes in said.items()}


def _mutant(name: str, content: bytes, turn: int, mutations: tuple[Mutation, ...] = MUTATIONS) -> bytes:
    return bytes(mutations[turn % len(mutations)](bytearray(content), np.random.default_rng([turn, *name.encode()])))


def _check(outcomes: dict[str, tuple[str, str]], names: list[str]) -> Counter[str]:
    allowed = (("frames", "ClipError"), ("surveyed", "ClipError"))
    wrong = {name: both for name, both in outcomes.items() if both[0] not in allowed[0] or both[1] not in allowed[1]}
    assert not wrong
    for name in names:  # undamaged
        assert outcomes[name] == ("frames", "ClipError" if name in NOT_SURVEYED else "surveyed"), name
    assert all(both == ("ClipError", "ClipError") for name, both in outcomes.items() if name.startswith("absurd"))
    kinds = Counter(read for read, _ in outcomes.values())
    assert kinds["ClipError"] > len(outcomes) // 4  # the mutations do bite
    return kinds


def test_damaged_files_give_frames_or_a_clip_error(tmp_path):
    names = ["a.ts", "flat.mp4"]
    _check(_outcomes(tmp_path, names, 6), names)


def test_pictures_with_odd_exif_are_read_or_named(tmp_path):
    read = [outcome for outcome, _ in _outcomes(tmp_path, list(PICTURES), 24, (_odd_exif,)).values()]
    assert set(read) <= {"frames", "ClipError"}
    assert read.count("ClipError") < len(read) // 8  # JPEGs whose resolution Pillow cannot make out, it does not open


def test_damaged_pictures_give_a_picture_or_a_clip_error(tmp_path):
    _check(_outcomes(tmp_path, list(PICTURES), 24), list(PICTURES))


@pytest.mark.slow
def test_many_damaged_files_give_frames_or_a_clip_error(tmp_path):
    kinds = _check(_outcomes(tmp_path, list(MAKERS), 24), list(MAKERS))
    assert kinds["frames"] > len(MAKERS)  # and not every damage is one
