"""The Big Buck Bunny trailer (CC BY 3.0, Blender Foundation): in the source archive of moviepy, fetched once by pip."""

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

KEPT = Path(__file__).parents[1] / "build" / "footage" / "trailer_bbb.mp4"
_SHA256 = "ce0d2ba68822a89ae65ee41b53be9de621771130c2aa1d0ff02d935df75b59ae"
_ARCHIVE = "moviepy-2.2.1"
_MEMBER = f"{_ARCHIVE}/docs/_static/medias/getting_started/moviepy_10_minutes/trailer_bbb.mp4"


def trailer() -> Path:
    """The film, under build/. Where pip cannot fetch it (58 MB) the test is skipped, but fails under CI=true."""
    if KEPT.is_file() and _digest(KEPT.read_bytes()) == _SHA256:
        return KEPT
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    fetch = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "moviepy", "moviepy==2.2.1"]
    done = subprocess.run([sys.executable, "-m", "pip", *fetch, "-d", KEPT.parent], capture_output=True, text=True)
    archive = KEPT.parent / f"{_ARCHIVE}.tar.gz"
    if done.returncode or not archive.is_file():
        reason = f"pip cannot fetch the source archive of moviepy 2.2.1: {done.stderr.strip()[-300:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with tarfile.open(archive) as opened:
        content = opened.extractfile(_MEMBER).read()
    assert _digest(content) == _SHA256
    draft = KEPT.with_suffix(".tmp-fetched")
    draft.write_bytes(content)
    draft.replace(KEPT)
    archive.unlink()
    return KEPT


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
