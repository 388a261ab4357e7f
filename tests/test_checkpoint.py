"""Checkpoints: what was saved comes back, what is damaged is named, what is half-written never counts."""

import errno
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.training import checkpoint
from mochi_lora.training.checkpoint import newest_checkpoint, remove_torn, save_checkpoint


def state(step: int) -> dict:
    return {
        "adapter": {"w": torch.full((4, 4), float(step)), "v": torch.arange(3.0)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "progress": {"step": step, "identity": {"run.seed": 2**63 - 1}, "best": None, "name": "日本"},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def three(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, state(step), keep=3)
    return tmp_path


def test_what_was_saved_comes_back(tmp_path):
    saved = save_checkpoint(tmp_path, 7, state(7), keep=1)
    assert saved == tmp_path / "step-000007"
    assert names(saved) == ["adapter.safetensors", "manifest.json", "optimizer.pt", "progress.json"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 7
    assert found.state.keys() == state(7).keys()
    assert torch.equal(found.state["adapter"]["w"], torch.full((4, 4), 7.0))
    assert found.state["optimizer"] == state(7)["optimizer"]
    assert found.state["progress"] == state(7)["progress"]


def test_no_folder_and_an_empty_one_hold_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path):
    for step in (2, 999_999, 1_000_000, 1_000_010):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert names(tmp_path) == ["step-1000000", "step-1000010"]
    assert newest_checkpoint(tmp_path).step == 1_000_010


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.pt", "progress.json"])
@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(three, capsys, name, harm):
    harm(three / "step-000030" / name)
    assert newest_checkpoint(three).step == 20
    told = capsys.readouterr().out.replace("\n", "")
    assert "step-000030: damaged checkpoint" in told
    assert name in told


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'{"schema": 1, "files": 3}', b'{"files": {}}', b"\xff"])
def test_a_damaged_manifest_damages_the_checkpoint(three, capsys, content):
    manifest = three / "step-000030" / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    assert newest_checkpoint(three).step == 20
    assert "step-000030: damaged checkpoint (no readable manifest" in capsys.readouterr().out.replace("\n", "")


def test_another_schema_is_not_guessed_at(three, capsys):
    manifest = three / "step-000030" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 99}))
    assert newest_checkpoint(three).step == 20
    assert "checkpoint schema 99, this version reads 1" in capsys.readouterr().out.replace("\n", "")


def test_when_all_are_damaged_nobody_starts_over_silently(three):
    for step in (10, 20, 30):
        flip(three / f"step-{step:06d}" / "adapter.safetensors")
    with pytest.raises(DamagedFileError, match="none of its 3 checkpoints is whole; start over with --fresh"):
        newest_checkpoint(three)


def test_a_damaged_newer_one_never_pushes_out_what_was_just_written(three):
    flip(three / "step-000030" / "optimizer.pt")
    save_checkpoint(three, 25, state(25), keep=1)
    assert names(three) == ["step-000025", "step-000030"]
    assert newest_checkpoint(three).step == 25
    save_checkpoint(three, 30, state(30), keep=1)
    assert names(three) == ["step-000030"]
    assert newest_checkpoint(three).step == 30


def test_half_written_and_half_deleted_ones_are_ignored_and_removed(three):
    shutil.copytree(three / "step-000030", three / "step-000040.tmp-123")
    shutil.copytree(three / "step-000010", three / "step-000010.tmp-old-123")
    (three / "step-000040.tmp-123" / "optimizer.pt").write_bytes(b"half")
    assert newest_checkpoint(three).step == 30
    remove_torn(three)
    assert names(three) == ["step-000010", "step-000020", "step-000030"]


def test_files_that_are_not_ours_do_no_harm(three):
    (three / "step-000030" / ".DS_Store").write_bytes(b"x")
    (three / "notes.txt").write_text("x")
    assert newest_checkpoint(three).step == 30


@pytest.mark.parametrize("victim", ["_write", "_publish"])
def test_a_failed_write_leaves_the_old_ones_and_no_remains(three, monkeypatch, victim):
    def fail(*_arguments):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(checkpoint, victim, fail)
    with pytest.raises(UserError, match="step-000040: the disk is full"):
        save_checkpoint(three, 40, state(40), keep=3)
    assert names(three) == ["step-000010", "step-000020", "step-000030"]


def test_a_disk_that_fills_up_inside_the_optimisers_file_is_named(tmp_path, monkeypatch):
    """torch writing to a path of its own would raise a RuntimeError without an errno."""

    def full(_path, _data):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_checkpoint(tmp_path, 1, state(1), keep=1)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_checkpoint_is_not_run(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest = three / "step-000030"
    torch.save({"state": Bomb()}, newest / "optimizer.pt")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["optimizer.pt"] = checkpoint.sha256_of_file(newest / "optimizer.pt")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError):
        newest_checkpoint(three)
    assert not Path("exploded").exists()
