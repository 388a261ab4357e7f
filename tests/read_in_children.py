"""Reads each file named on standard input in a child of its own, limited in time and memory; one JSON line for each.

A program, run by `test_fuzz_media`: what crashes, hangs or fills the memory must not take pytest with it.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import decord  # noqa: F401 - loaded once, before the children
import torch

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
    try:
        info = probe(path)
        bucket = choose_bucket(info, source, BUCKETS, upscale=True)
        clip = read_clip(source, info, bucket)
    except ClipError as error:
        return "ClipError" if path.name in str(error) else f"ClipError without the file's name: {error}"
    except BaseException as error:  # noqa: BLE001 - reported, and judged by the test
        return f"{type(error).__name__}: {error}"
    whole = clip.shape == (3, bucket.frames, 64, 128) and bool(torch.isfinite(clip).all()) and bool((clip.abs() <= 1).all())
    return "frames" if whole else f"not a clip: {clip.shape}"


def read_in_child(path: Path) -> str:
    """What `read` says, or how the child ended instead."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(send, read(path).encode()[:4000])
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
        print(json.dumps([line.strip(), read_in_child(Path(line.strip()))]), flush=True)
