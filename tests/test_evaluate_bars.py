"""The verdict on clips whose truth is known: perfect and broken adapters of the drawn world, through the real command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn_evaluation import Film, different_scenes, replaying, restyled, same, write_clips
from tiny_commands import TINY_ROAD, frames_of

from mochi_lora.cli import main
from mochi_lora.inference.video import write_mp4
from mochi_lora.tiny.dataset import DrawnSet, draw_clips
from mochi_lora.tiny.render import render
from mochi_lora.tiny.world import TRIGGER, captions

pytestmark = pytest.mark.slow
PROMPTS = 10
FEW = 8  # prompts of what is broken beyond doubt; seven are the fewest that three axes can be tested with
OTHERS = 6  # prompts of a set that is asked for bleed alone, which needs five
WORDS = [
    *("--config", str(TINY_ROAD), "--evaluation.trigger", TRIGGER, "--evaluation.frames_per_clip", "4"),
    *("--evaluation.resamples", "1000", "--evaluation.alignment_margin", "0.05"),
    *("--evaluation.quality_margin", "0.02"),
    *("--backbones.subject", "builtin:efficientnet-lite0", "--backbones.background", "builtin:efficientnet-lite0"),
    *("--backbones.style", "builtin:efficientnet-lite0-gram", "--backbones.text", "null"),
    *("--backbones.video_text", "drawn-world"),
]


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Features are remembered by content, so all evaluations of this room share them."""
    folder = tmp_path_factory.mktemp("bars")
    (folder / "features").mkdir()
    draw_clips(folder / "chalk", DrawnSet("chalk", 24))
    return folder


def judged(room: Path, name: str, sets: dict[str, tuple[int, Film]], data: str = "chalk") -> dict:
    """results.json of an evaluation of such an adapter, trained on the clips in `data`."""
    folder = write_clips(room / name, sets)
    (folder / "features").symlink_to(room / "features")
    asked = ["--from-videos", str(folder), "--data.clips", str(room / data), "--run.folder", str(room / "run")]
    assert main(["evaluate", *WORDS, *asked]) == 0
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def primary(found: dict) -> dict[str, dict]:
    return {one["measure"].split(".")[0]: one for one in found["comparisons"] if one["primary"]}


@pytest.fixture(scope="module")
def healthy(room) -> dict:
    others = dict.fromkeys(("plain", "unrelated"), (OTHERS, same("base")))
    return judged(room, "healthy", {"trigger": (PROMPTS, restyled("chalk")), **others})


@pytest.fixture(scope="module")
def leaking(room) -> dict:
    others = dict.fromkeys(("plain", "unrelated"), (OTHERS, restyled("chalk")))
    return judged(room, "leaking", {"trigger": (FEW, restyled("chalk")), **others})


def test_a_good_style_moves_the_three_axes_as_ground_truth_says(healthy):
    axes = primary(healthy)
    assert axes["style"]["conclusion"] == "better"
    assert axes["style"]["difference"]["low"] > 0
    assert {axes[axis]["conclusion"] for axis in ("align", "quality")} <= {"better", "no worse"}
    assert healthy["verdict"]["worked"] is True
    truth = {what: after - before for what, (before, after) in healthy["truth"].items()}
    assert truth.pop("Style, 0 base to 1 chalk") > 0.8
    assert min(truth.values()) >= -0.1
    assert healthy["distance"]["adapter"] < healthy["distance"]["base"]


def test_a_good_style_is_not_taken_for_copying(healthy):
    assert healthy["memorisation"]["conclusion"] == "does not memorise"


def test_training_clips_of_the_very_words_somewhere_else_are_not_copies_either(room):
    folder = room / "same-words"
    folder.mkdir()
    for number, scene in enumerate(different_scenes(5)[:PROMPTS]):
        write_mp4(folder / f"{number}.mp4", restyled("chalk")(scene, 9000 + number))
        (folder / f"{number}.txt").write_text(f"{TRIGGER}, {next(captions(scene))}\n", encoding="utf-8")
    found = judged(room, "elsewhere", {"trigger": (PROMPTS, restyled("chalk"))}, data="same-words")
    assert found["memorisation"]["conclusion"] == "does not memorise"


def test_replayed_training_clips_are_memorising(room):
    few = room / "three"
    few.mkdir()
    for path in sorted((room / "chalk").glob("00[0-2].*")):
        shutil.copy(path, few)
    clips = [frames_of(path) for path in sorted(few.glob("*.mp4"))]
    found = judged(room, "replay", {"trigger": (FEW, replaying(clips))}, data="three")
    assert found["memorisation"]["conclusion"] == "memorises"
    assert found["memorisation"]["flagged_share"] == 1
    assert found["verdict"]["worked"] is False
    assert "replays its training clips" in found["verdict"]["headline"]


def test_an_adapter_that_ignores_its_prompts_fails_alignment_and_nothing_else(room):
    def of_the_next(_scene, number):
        return restyled("chalk")(different_scenes(5)[(number + 1) % FEW], number)

    found = judged(room, "shuffled", {"trigger": (FEW, of_the_next)})
    axes = primary(found)
    assert (axes["style"]["conclusion"], axes["align"]["conclusion"]) == ("better", "worse")
    assert found["verdict"]["worked"] is False
    assert "stopped listening" in found["verdict"]["headline"]


def test_a_frozen_adapter_is_called_frozen(room):
    def frozen(scene, number):
        first = restyled("chalk")(scene, number)[:1]
        return np.repeat(first, len(render(scene, "base")), axis=0)

    found = judged(room, "frozen", {"trigger": (FEW, frozen)})
    assert found["verdict"]["worked"] is False
    assert "stopped moving" in found["verdict"]["headline"]
    assert primary(found)["quality"]["difference"]["value"] > 0, "stillness is rewarded: the trap that the verdict names"


def test_style_everywhere_bleeds_and_style_where_called_does_not(healthy, leaking):
    nowhere, everywhere = ({one["prompt_set"]: one["ratio"]["value"] for one in found["bleed"]} for found in (healthy, leaking))
    assert set(nowhere) == set(everywhere) == {"plain", "unrelated"}
    assert max(map(abs, nowhere.values())) <= 0.2
    assert min(everywhere.values()) >= 0.8
    assert max(everywhere.values()) <= 1.2
    assert "leaks" in leaking["verdict"]["headline"]
