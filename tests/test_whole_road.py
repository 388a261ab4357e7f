"""The README's own commands in a copy of the checkout: a style is really learnt, and judged by ground truth.

What `make quickstart` trains is looked at by `mochi_lora.tiny`'s judge, which measures pixels: the test that the product works.
"""

import json
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
from drawn_prompts import drawn
from synthetic import records
from tiny_commands import TINY_ROAD

from mochi_lora.model.adapter_file import load_adapter, read_provenance
from mochi_lora.tiny.exam import exam_scenes, exam_sentences, marks
from mochi_lora.tiny.world import TRIGGER

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PARTS = ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "train.py")
FOLDERS = ("configs", "data_prep", "examples", "mochi_lora")
PROGRAMS = {"python": "", "accelerate": "-m accelerate.commands.accelerate_cli", "mochi-lora": "-m mochi_lora"}
STEPS = 240
SCENES = 32
# The least that `evaluate` does: the README's own prompts, in the tiny road's words.
EVALUATION = {
    "evaluation": {
        "trigger": "chalk style",
        "prompts": ["chalk style, a rabbit in a meadow", "chalk style, a red ball on a hill"],
        "unrelated": [],
        "seeds": 1,
        "strengths": [],
        "curve_checkpoints": 0,
        "training_captions": 0,
        "frames_per_clip": 2,
        "resamples": 100,
    },
    "backbones": {
        "subject": "builtin:efficientnet-lite0",
        "background": "builtin:efficientnet-lite0",
        "style": "builtin:efficientnet-lite0-gram",
        "text": None,
        "video_text": None,
    },
}


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def clean_environment() -> dict[str, str]:
    """Without what `make test` and launchers put there, but for one thread a process: the cores are shared with other tests."""
    ours = ("MAKEFLAGS", "MAKELEVEL", "RANK")
    return {name: value for name, value in os.environ.items() if name not in ours}


def make(folder: Path, target: str) -> str:
    """What `make target` says. Of several threads on a core that is shared, each would wait for the others, and busily."""
    command = ["make", target, "THREADS=1"]
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
    assert load_adapter(run / "adapter.safetensors").config["lora_alpha"] == 16
    assert list((folder / "cache" / "quickstart").glob("index/*.json"))
    assert "Traceback" not in told
    shown = [folder / line.split()[-1] for line in told.splitlines()[-3:]]
    assert [path.name for path in shown] == ["quickstart", "quick-before_after.png", "quick-report.html"]
    assert all(path.exists() for path in shown), "the paths to look at come last"


def test_the_report_says_that_the_style_is_there(road):
    folder, _ = road
    found = json.loads((folder / "runs" / "quickstart" / "evaluation" / "quick-results.json").read_text(encoding="utf-8"))
    before, after = found["truth"]["Style, 0 base to 1 chalk"]
    assert after >= 2 / 3 - 0.07, "of eight clips after the codec; more of them are asked below"
    assert after - before > 1 / 3, "the base knows other looks, and tries them at a word it does not know"
    axes = {one["measure"].split(".")[0]: one for one in found["comparisons"] if one["primary"]}
    assert axes["style"]["difference"]["low"] > 0


def test_held_out_loss_falls(road):
    folder, _ = road
    lines = records(folder / "runs" / "quickstart", "heldout")
    losses = [line["heldout/loss"] for line in lines]
    assert [line["step"] for line in lines] == list(range(0, STEPS + 1, 80))
    assert losses[-1] < 0.6 * losses[0]


@pytest.fixture(scope="module")
def learnt(road) -> dict[str, dict[str, float]]:
    """Marks of held-out scenes: by the base and by the adapter, with and without the trigger."""
    folder, _ = road
    adapter = folder / "runs" / "quickstart" / "adapter.safetensors"
    scenes = exam_scenes(SCENES)
    plain = exam_sentences(scenes)
    called = [f"{TRIGGER}, {sentence}" for sentence in plain]
    return {
        f"{side}, {name}": marks(drawn(told, path), scenes)
        for side, path in (("base", None), ("adapter", adapter))
        for name, told in (("trigger", called), ("plain", plain))
    }


def test_the_style_is_learnt(learnt):
    """Two thirds of the way from the base's rendering of a scene to the style's, where no other look comes (test_judge.py)."""
    assert learnt["adapter, trigger"]["style"] >= 2 / 3, learnt


@pytest.mark.parametrize("word", ["colour", "shape", "motion"])
def test_contents_stay_right(learnt, word):
    """Down by ten points at most; the standard error of 32 clips is some six."""
    assert learnt["adapter, trigger"][word] >= learnt["base, plain"][word] - 0.1 - 0.06, learnt


def test_other_prompts_stay_as_they_were(learnt):
    """Bleed: the style's change without the trigger, as a share of its change with it."""
    change = {name: learnt[f"adapter, {name}"]["style"] - learnt[f"base, {name}"]["style"] for name in ("trigger", "plain")}
    assert abs(change["plain"]) <= 0.2 * change["trigger"], learnt


def test_the_videos_play(road):
    folder, _ = road
    run = folder / "runs" / "quickstart"
    videos = sorted(run.rglob("*.mp4"))
    assert {path.parent.name for path in videos} >= {"step-000000", f"step-{STEPS:06d}"}
    for path in videos:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.average_rate == 30
        assert np.std(frames) > 1, "not one flat colour"


def test_a_second_time_encodes_and_trains_nothing_again(road):
    folder, _ = road
    metrics = folder / "runs" / "quickstart" / "metrics.jsonl"
    before = metrics.read_bytes()
    told = make(folder, "quickstart")
    assert f"finished at step {STEPS}" in told
    assert "pip" not in told
    assert metrics.read_bytes() == before


def test_the_commands_for_ones_own_clips_run_as_the_readme_writes_them(road):
    """Only `mine.yaml` is ours: real clips, and settings with which a CPU and a tiny model do. The download is left out."""
    folder, _ = road
    lines = re.findall(r"^    ((?:python|accelerate|mochi-lora) .*--config mine\.yaml.*?)(?:  +#.*)?$", readme(), re.MULTILINE)
    download, *lines = lines
    assert download.startswith("mochi-lora download")
    assert [line.split()[0] for line in lines] == ["python", "accelerate", "mochi-lora", "mochi-lora"]
    settings = yaml.safe_load(TINY_ROAD.read_text(encoding="utf-8")) | EVALUATION
    settings["run"]["folder"] = "runs/mine"
    settings["train"] |= {"steps": 4, "warmup_steps": 1, "sample_every": 0}
    settings["sample"]["steps"] = 4
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
    assert (folder / "runs" / "mine" / "evaluation" / "report.html").is_file()


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
