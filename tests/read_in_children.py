"""Reads and surveys each file named on standard input in children of its own, limited in time and memory; one JSON line each.

A program, run by `test_fuzz_media`: what crashes, hangs or fills the memory must not take pytest with it.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mochi_lora.config.curation import FilterConfig, SplitConfig
from mochi_lora.curation.filters import filter_clips
from mochi_lora.curation.split import split_source
from mochi_lora.curation.survey import survey_source
from mochi_lora.data.decode import read_clip
from mochi_lora.data.geometry import choose_bucket
from mochi_lora.data.probe import probe
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import Bucket

SECONDS, BYTES = 30, 2 << 30  # per file; bytes beyond what the program itself has mapped
BUCKETS = [Bucket(37, 64, 128), Bucket(7, 64, 128), Bucket(1, 64, 128)]


def read(path: Path) -> str:
    """ "frames", or what kind of error and its message."""
    source = ClipSource(path, "fuzz")

    def read_one() -> str:
        info = probe(path)
        bucket = choose_bucket(info, source, BUCKETS, upscale=True)
        clip = read_clip(source, info, bucket)
        whole = clip.shape == (3, bucket.frames, 64, 128) and bool(torch.isfinite(clip).all()) and bool((clip.abs() <= 1).all())
        return "frames" if whole else f"not a clip: {clip.shape}"

    return _outcome(path, read_one)


def prepare(path: Path) -> str:
    """ "surveyed", or what kind of error and its message: the way of raw footage to judged clips."""
    settings = SplitConfig(frames=7)

    def survey() -> str:
        found = survey_source(probe(path), settings, lambda frames: None)
        clips, became = split_source(path, found, settings, path.parent)
        filter_clips(clips, FilterConfig())
        lost = sum(became.spent.lost().values())
        return "surveyed" if abs(became.spent.clips + lost - became.seconds) < 0.1 else f"seconds do not add up: {became}"

    return _outcome(path, survey)


def _outcome(path: Path, work: Callable[[], str]) -> str:
    try:
        return work()
    except ClipError as error:
        return "ClipError" if path.name in str(error) else f"ClipError without the file's name: {error}"
    except BaseException as error:  # noqa: BLE001 - reported, and judged by the test
        return f"{type(error).__name__}: {error}"


def in_child(work: Callable[[Path], str], path: Path) -> str:
    """What `work` says, or how the child ended instead."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(send, work(path).encode()[:4000])
        os._exit(0)
    os.close(send)
    until = time.monotonic() + SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(receive)
            return f"hangs: over {SECONDS} s"
        time.sleep(0.002)
    said = os.read(receive, 4096).decode(errors="replace")
    os.close(receive)
    return said if ended[1] == 0 else f"crashes: {os.waitstatus_to_exitcode(ended[1])}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        file = Path(line.strip())
        print(json.dumps([str(file), in_child(read, file), in_child(prepare, file)]), flush=True)
