"""Adapters of mochi-tiny whose worth is known, and the data they learnt from: `python tests/make_adapters.py [NAME ...]`.

Writes tests/adapters/NAME.safetensors, in float16, in minutes each on a CPU. The tests of the evaluation read the files
and draw the data again.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from mochi_lora.cli import main
from mochi_lora.files import digest_of
from mochi_lora.model.adapter_file import load_adapter, read_provenance, save_adapter
from mochi_lora.tiny.dataset import DrawnSet, draw_clips
from mochi_lora.tiny.pretrained import WEIGHTS
from mochi_lora.tiny.world import HELD_OUT_MOTION

FOLDER = Path(__file__).parent / "adapters"
STYLE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
MOTION = STYLE.with_name("quickstart_motion.yaml")
RANK_4 = ("--adapter.rank", "4", "--adapter.alpha", "4")  # a fourth of the bytes


@dataclass(frozen=True)
class Lesson:
    """What an adapter learnt from: clips made in a folder, and settings that differ from the quickstart's."""

    clips: Callable[[Path], None]
    settings: tuple[str, ...] = ()
    recipe: Path = STYLE


def style_and_plain(folder: Path) -> None:
    """The quickstart's own clips."""
    draw_clips(folder / "chalk", DrawnSet("chalk", 64))
    draw_clips(folder / "plain", DrawnSet("base", 64, seed=1))


def three(folder: Path) -> None:
    """Three clips of the style, and nothing else."""
    draw_clips(folder / "chalk", DrawnSet("chalk", 3))


def circles(folder: Path) -> None:
    """The motion recipe's clips: what goes round, and what moves as mochi-tiny knows it."""
    draw_clips(folder / "circles", DrawnSet("base", 96, motions=(HELD_OUT_MOTION,)))
    draw_clips(folder / "plain", DrawnSet("base", 64, seed=1))


def exchanged(folder: Path) -> None:
    """The style's clips of the quickstart, each with the caption of the one after it; none that would keep words true."""
    draw_clips(folder / "chalk", DrawnSet("chalk", 64))
    captions = sorted((folder / "chalk").glob("*.txt"))
    words = [path.read_text(encoding="utf-8") for path in captions]
    for path, text in zip(captions, words[1:] + words[:1], strict=True):
        path.write_text(text, encoding="utf-8")


LESSONS = {
    "healthy": Lesson(style_and_plain, RANK_4),
    "motion": Lesson(circles, recipe=MOTION),
    "overtrained": Lesson(
        three,
        (
            *RANK_4,
            "--train.steps",
            "2400",
            "--train.learning_rate",
            "2e-3",
            "--train.batch_size",
            "3",
            "--data.validation_fraction",
            "0",
            "--train.validate_every",
            "0",
        ),
    ),
    "shuffled": Lesson(exchanged, (*RANK_4, "--train.steps", "1000", "--train.learning_rate", "2e-3")),
}


def words(lesson: Lesson, folder: Path) -> list[str]:
    """The command line's settings for a lesson whose clips lie in `folder`/clips."""
    weights = [entry.get("weight") for entry in yaml.safe_load(lesson.recipe.read_text(encoding="utf-8"))["data"]["mix"]]
    found = zip(sorted((folder / "clips").iterdir()), weights, strict=False)
    parts = [{"clips": str(path)} | ({"weight": weight} if weight else {}) for path, weight in found]
    return [
        *("--config", str(lesson.recipe), "--model.base", str(WEIGHTS), "--run.folder", str(folder / "run")),
        *("--data.mix", json.dumps(parts), "--data.cache", str(folder / "cache"), "--train.sample_every", "0"),
        *lesson.settings,
    ]


def settings_digest(lesson: Lesson) -> str:
    """Of the recipe, whatever its comments, and what the lesson changes in it: a changed recipe asks for its adapter anew."""
    return digest_of({"recipe": yaml.safe_load(lesson.recipe.read_text(encoding="utf-8")), "settings": lesson.settings})


def make(name: str) -> Path:
    """Train one and keep it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        LESSONS[name].clips(folder / "clips")
        settings = words(LESSONS[name], folder)
        assert main(["encode", *settings]) == 0
        assert main(["train", *settings]) == 0
        made = folder / "run" / "adapter.safetensors"
        adapter = load_adapter(made)
        adapter.tensors.update({key: tensor.half() for key, tensor in adapter.tensors.items()})
        origin = read_provenance(made)
        facts = {"step": origin["step"], "lesson": name, "settings": settings_digest(LESSONS[name])}
        save_adapter(FOLDER / f"{name}.safetensors", adapter, facts)
    return FOLDER / f"{name}.safetensors"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for wanted in sys.argv[1:] or LESSONS:
        print(make(wanted))
