"""Writing: old content or new, nothing between, and a full disk is said to be full."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mochi_lora import files
from mochi_lora.files import (
    DiskFullError,
    digest_of,
    only_one,
    remove_abandoned,
    sha256_of_file,
    write_atomic,
    write_json,
    write_text,
)

# 3 MB into 1 MB. safetensors writes without Python's file objects, so its error has no errno.
_ON_A_FULL_DISK = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from mochi_lora.files import DiskFullError, write_atomic, write_text
folder = Path(sys.argv[1])
for name, write in {
    "a.txt": lambda path: write_text(path, "x" * 3_000_000),
    "b.safetensors": lambda path: write_atomic(path, lambda draft: save_file({"x": np.zeros(400_000)}, draft)),
}.items():
    try:
        write(folder / name)
    except DiskFullError as error:
        assert str(error).startswith(f"{folder / name}: the disk is full"), error
    else:
        raise SystemExit(f"{name} was written")
assert list(folder.iterdir()) == [], list(folder.iterdir())
print("refused twice")
"""


def _write_half(path):
    path.write_text("half")
    raise RuntimeError("the writer broke")


def _interrupted(path):
    path.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("write", "error"), [(_write_half, RuntimeError), (_interrupted, KeyboardInterrupt)])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, write, error):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")
    with pytest.raises(error):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_readers_see_the_old_content_until_the_new_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write(temporary):
        temporary.write_text("new")
        assert temporary.parent == path.parent  # a rename across file systems would be a copy
        assert path.read_text() == "old"

    write_atomic(path, write)
    assert path.read_text() == "new"


def test_the_content_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    seen = []
    monkeypatch.setattr(files, "sync_to_disk", lambda synced: seen.append((synced.name, path.exists())))
    write_text(path, "new")
    (draft, named_early), (folder, named_late) = seen
    assert draft.startswith("file.txt.tmp-")
    assert not named_early
    assert (folder, named_late) == (tmp_path.name, True)


def test_two_writers_of_one_path_do_not_share_a_draft(tmp_path):
    path = tmp_path / "file.txt"

    def write(temporary):
        temporary.write_text("outer")
        write_text(path, "inner")
        assert temporary.read_text() == "outer"

    write_atomic(path, write)
    assert path.read_text() == "outer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_with_its_path(tmp_path, monkeypatch, error):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(_):
        raise error

    with pytest.raises(DiskFullError, match=r"file\.txt: the disk is full; free some space") as caught:
        write_atomic(path, fail)
    assert caught.value.__cause__ is error
    monkeypatch.setattr(files.os, "fsync", fail)  # delayed allocation: the disk may be found full only here
    with pytest.raises(DiskFullError, match=r"file\.txt: the disk is full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), SafetensorError("invalid (os error 128)")])
def test_another_failure_is_not_called_a_full_disk(tmp_path, error):
    def fail(_):
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomic(tmp_path / "file.txt", fail)
    assert caught.value is error


def test_a_disk_that_is_really_full(tmp_path):
    mount = f"mount -t tmpfs -o size=1m tmpfs '{tmp_path}'"  # in a mount namespace of its own: gone with the process
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("mounting takes root")
    command = f"{mount} && exec '{sys.executable}' -c \"$0\" '{tmp_path}'"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command, _ON_A_FULL_DISK], capture_output=True, text=True)
    assert done.stdout == "refused twice\n", done.stderr


def test_text_is_utf8_whatever_the_locale(tmp_path):
    write_json(tmp_path / "a.json", {"caption": "schöne Blüte 兔"})
    content = (tmp_path / "a.json").read_bytes()
    assert "schöne Blüte 兔".encode() in content
    assert json.loads(content) == {"caption": "schöne Blüte 兔"}


def test_the_hash_of_a_file_is_that_of_all_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_HASH_BLOCK", 7)
    content = bytes(range(256))
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_digest_knows_content_and_not_the_order_of_keys():
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"a": 1, "b": [1, 2]}) != digest_of({"a": 1, "b": [2, 1]})


def test_a_folder_is_held_against_a_second_process_and_let_go(tmp_path):
    folder = tmp_path / "run"
    attempt = (
        "import pathlib, sys\nfrom mochi_lora.files import only_one\n"
        f"with only_one(pathlib.Path({str(folder)!r}), 'training'): pass\n"
    )
    with only_one(folder, "training"):
        held = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True)
    free = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True)
    assert "another process is training here" in held.stderr
    assert free.returncode == 0, free.stderr
    assert not folder.exists()


def test_only_temporary_files_old_enough_are_swept(tmp_path):
    old, young, kept = (tmp_path / "deep" / name for name in ("a.tmp-1-0", "b.tmp-2-0", "c.safetensors"))
    old.parent.mkdir()
    for path in (old, young, kept):
        path.write_text("x")
    os.utime(old, (0, 0))
    os.utime(kept, (0, 0))
    remove_abandoned(tmp_path, older_than_seconds=3600)
    assert (old.exists(), young.exists(), kept.exists()) == (False, True, True)
    remove_abandoned(tmp_path)
    assert not young.exists()


def test_a_file_of_tensors_may_be_read_by_whom_a_new_file_may_be(tmp_path):
    """A cache or an adapter on a shared disk; safetensors writes files that are their owner's alone."""
    (tmp_path / "new").touch()
    write_atomic(tmp_path / "a.safetensors", lambda draft: save_file({"x": np.zeros(4)}, draft))
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
