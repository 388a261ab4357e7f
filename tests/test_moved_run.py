"""A run taken to another machine, as docs/rented-gpu.md says: its folders at another path, then `encode` and `train` again."""

import shutil
from pathlib import Path

import pytest
from synthetic import records, same_tensors
from tiny_commands import count_of, settings

from mochi_lora.cli import main

pytestmark = pytest.mark.slow  # commands one after the other

STEPS = [
    *("--train.checkpoint_every", "2", "--train.warmup_steps", "1", "--train.lr_schedule", "constant"),
    *("--train.sample_every", "0", "--train.validate_every", "0", "--train.steps"),
]


def test_a_run_goes_on_at_another_path_bit_for_bit(tiny, small_clips, tmp_path, monkeypatch, capsys):
    words = [*settings(tiny, Path("clips"), Path("cache")), "--run.folder", "runs/mine"]
    here, elsewhere, whole = (tmp_path / name for name in ("here", "elsewhere", "whole"))
    here.mkdir()
    shutil.copytree(small_clips, here / "clips")
    monkeypatch.chdir(here)
    assert main(["encode", *words]) == 0
    shutil.copytree(here, whole)
    assert main(["train", *words, *STEPS, "2"]) == 0
    shutil.copytree(here, elsewhere)
    shutil.rmtree(here)  # the machine was taken away

    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert main(["train", *words, *STEPS, "4"]) == 1
    assert "mochi-lora encode" in capsys.readouterr().err
    assert main(["encode", *words]) == 0
    assert count_of("of these already cached", capsys.readouterr().out) == 4
    assert main(["train", *words, *STEPS, "4"]) == 0
    assert "continuing at step 2" in capsys.readouterr().out

    monkeypatch.chdir(whole)
    assert main(["encode", *words]) == 0
    assert main(["train", *words, *STEPS, "4"]) == 0
    assert records(elsewhere / "runs" / "mine") == records(whole / "runs" / "mine")
    assert same_tensors(*(folder / "runs" / "mine" / "adapter.safetensors" for folder in (elsewhere, whole)))
