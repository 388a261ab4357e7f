"""The README's own command, from clips to a video to look at, in a copy of the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from synthetic import records

from mochi_lora.model.adapter_file import load_adapter, read_provenance

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PARTS = ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "train.py")
FOLDERS = ("configs", "data_prep", "examples", "mochi_lora")
PROGRAMS = {"python": "", "accelerate": "-m accelerate.commands.accelerate_cli", "mochi-lora": "-m mochi_lora"}
STEPS = 60


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def clean_environment() -> dict[str, str]:
    """Without what `make test` and launchers put there."""
    ours = ("MAKEFLAGS", "MAKELEVEL", "OMP_NUM_THREADS", "RANK")
    return {name: value for name, value in os.environ.items() if name not in ours}


def make(folder: Path, target: str) -> str:
    """What `make target` says."""
    command = ["make", target]
    done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stand_in(folder: Path) -> None:
    """A .venv that counts as made and leads to the environment of this test: set-up is not what is tested here."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in PROGRAMS.items():
        real = Path(sys.executable).with_name(name)
        called = str(real) if real.exists() else f"{sys.executable} {module}"
        (programs / name).write_text(f'#!/bin/sh\nexec {called} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / ".venv" / ".installed").touch()


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A copy of the checkout in which `make quickstart` was run, and what it said."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in PARTS:
        shutil.copy2(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    stand_in(folder)
    return folder, make(folder, "quickstart")


def test_the_readme_begins_with_the_two_commands():
    commands = re.findall(r"^ *(?:\$ )?(make \w+)", readme(), re.MULTILINE)
    assert commands[:2] == ["make quickstart", "make test"]


def test_every_stage_leaves_what_the_next_one_needs(road):
    folder, told = road
    run = folder / "runs" / "quickstart"
    assert (run / "adapter.safetensors").is_file()
    assert read_provenance(run / "adapter.safetensors")["step"] == STEPS
    assert load_adapter(run / "adapter.safetensors").config["lora_alpha"] == 8
    assert list((folder / "cache" / "quickstart").glob("index/*.json"))
    assert "runs/quickstart" in told.splitlines()[-1], "the path to look at comes last"
    assert "Traceback" not in told


def test_the_adapter_learns(road):
    """Same clips, noise and sigmas each time, so little is enough: 60 steps on random base weights give 0.2 per cent."""
    folder, _ = road
    lines = records(folder / "runs" / "quickstart", "heldout")
    assert [line["step"] for line in lines] == [0, 20, 40, 60]
    losses = [line["heldout/loss"] for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.999 * losses[0]


def test_the_videos_play(road):
    folder, _ = road
    run = folder / "runs" / "quickstart"
    videos = sorted(run.rglob("*.mp4"))
    assert {path.parent.name for path in videos} >= {"step-000000", "step-000060"}
    assert len(videos) >= 6, "two prompts, before, after, and by the sample command"
    for path in videos:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.average_rate == 30
        assert len(frames) == 19
        assert frames[0].shape == (64, 112, 3)
        assert np.std(frames) > 1, "not one flat colour"


def test_a_second_time_encodes_and_trains_nothing_again(road):
    folder, _ = road
    metrics = folder / "runs" / "quickstart" / "metrics.jsonl"
    before = metrics.read_bytes()
    told = make(folder, "quickstart")
    assert f"finished at step {STEPS}" in told
    assert "pip" not in told
    assert metrics.read_bytes() == before


def test_the_three_commands_for_ones_own_clips_run_as_the_readme_writes_them(road):
    """Only `mine.yaml` is ours: the quickstart's settings under another run, so that a CPU and a tiny model do."""
    folder, _ = road
    lines = re.findall(r"^    ((?:python|accelerate|mochi-lora) .*--config mine\.yaml.*?)(?:  +#.*)?$", readme(), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["python", "accelerate", "mochi-lora"]
    settings = yaml.safe_load((folder / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    settings["run"]["folder"] = "runs/mine"
    settings["train"] |= {"steps": 4, "warmup_steps": 1, "sample_every": 0}
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        done = subprocess.run(
            shlex.split(line),
            cwd=folder,
            env=clean_environment() | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert load_adapter(folder / "runs" / "mine" / "adapter.safetensors").tensors
    assert list((folder / "runs" / "mine" / "samples").rglob("*.mp4"))


def test_the_readmes_diffusers_lines_load_the_adapter(road):
    """Its four lines, with the tiny model and the quickstart's adapter in place of the names."""
    folder, _ = road
    block = re.search(r"In diffusers:\n\n((?:    .*\n|\n)+)", readme())
    assert block is not None
    code = "\n".join(line.removeprefix("    ") for line in block[1].splitlines())
    names = {
        "genmo/mochi-1-preview": "build/mochi-tiny",
        "runs/mine/adapter.safetensors": "runs/quickstart/adapter.safetensors",
        "torch.bfloat16": "torch.float32",
    }
    for name, ours in names.items():
        assert name in code
        code = code.replace(name, ours)
    code += "\nassert pipe.get_list_adapters() == {'transformer': ['default_0']}, pipe.get_list_adapters()"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
