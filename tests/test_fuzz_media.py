"""Damaged files of every kind of container: the outcome is frames or a `ClipError`, in bounded time and memory."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from footage import H264, hdr, make_clip, make_interlaced

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
}
ONE_BY_ONE = Path(__file__).with_name("read_in_children.py")

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


MUTATIONS: tuple[Mutation, ...] = (_flipped, _flipped_head, _noise, _zeros, _cut, _gap, _twice, _huge_numbers)


def _outcomes(folder: Path, names: list[str], rounds: int) -> dict[str, str]:
    files = []
    for name in names:
        whole = MAKERS[name](folder / name)
        files.append(whole)
        for turn in range(rounds):
            mutation = MUTATIONS[turn % len(MUTATIONS)]
            rng = np.random.default_rng([turn, *name.encode()])
            damaged = whole.with_name(f"{turn:02}{mutation.__name__}_{name}")
            damaged.write_bytes(mutation(bytearray(whole.read_bytes()), rng))
            files.append(damaged)
    listed = "".join(f"{file}\n" for file in files)
    done = subprocess.run([sys.executable, ONE_BY_ONE], input=listed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    assert sorted(said) == sorted(map(str, files))
    return {Path(file).name: outcome for file, outcome in said.items()}


def _check(outcomes: dict[str, str], names: list[str]) -> Counter[str]:
    wrong = {name: outcome for name, outcome in outcomes.items() if outcome not in ("frames", "ClipError")}
    assert not wrong
    assert all(outcomes[name] == "frames" for name in names)  # undamaged
    kinds = Counter(outcomes.values())
    assert kinds["ClipError"] > len(outcomes) // 4  # the mutations do bite
    return kinds


def test_damaged_files_give_frames_or_a_clip_error(tmp_path):
    names = ["a.mp4", "a.ts"]
    _check(_outcomes(tmp_path, names, 8), names)


@pytest.mark.slow
def test_many_damaged_files_give_frames_or_a_clip_error(tmp_path):
    kinds = _check(_outcomes(tmp_path, list(MAKERS), 24), list(MAKERS))
    assert kinds["frames"] > len(MAKERS)  # and not every damage is one
