"""`mochi-lora evaluate` on adapters that mochi-tiny really learnt: a healthy one, one overtrained on three clips, one lied to.

`python tests/make_adapters.py` made them. The judge of `mochi_lora.tiny` measures what their clips show from pixels, so the
report's words have a truth to be held against.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from make_adapters import FOLDER, LESSONS, words

from mochi_lora.cli import main
from mochi_lora.tiny.exam import exam_scenes, exam_sentences
from mochi_lora.tiny.world import TRIGGER

pytestmark = pytest.mark.slow
PROMPTS = 10
FEW = 8  # where what is wrong is beyond doubt; below seven nothing is tested


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Makes results.json for one of the adapters. What is the same for all is made once: the base's videos, and features."""
    shared = tmp_path_factory.mktemp("adapters")

    def make(name: str, prompts: int, *more: str) -> dict[str, Any]:
        folder = shared / name
        (folder / "report").mkdir(parents=True)
        for part in ("base", "features"):
            (shared / part).mkdir(exist_ok=True)
            (folder / "report" / part).symlink_to(shared / part)
        return evaluation(name, folder, prompts, *more)

    return make


def evaluation(name: str, folder: Path, prompts: int, *more: str) -> dict[str, Any]:
    """results.json for one of the adapters, its training clips drawn again."""
    LESSONS[name].clips(folder / "clips")
    held_out = list(dict.fromkeys(exam_sentences(exam_scenes(4 * prompts))))[:prompts]
    asked = [f"{TRIGGER}, {sentence}" for sentence in held_out]
    settings = {
        "evaluation.prompts": json.dumps(asked),
        "evaluation.seeds": "1",
        "evaluation.frames_per_clip": "4",
        "evaluation.curve_checkpoints": "0",
        "evaluation.strengths": "[]",
        "evaluation.unrelated": "[]",
        "evaluation.training_captions": "3",
        "evaluation.resamples": "1000",
    }
    given = [word for key, value in settings.items() for word in (f"--{key}", value)]
    said = ["--adapter", str(FOLDER / f"{name}.safetensors"), "--output", str(folder / "report"), *given, *more]
    assert main(["evaluate", *words(LESSONS[name], folder), *said]) == 0
    return json.loads((folder / "report" / "results.json").read_text(encoding="utf-8"))


def primary(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["measure"].split(".")[0]: one for one in found["comparisons"] if one["primary"]}


@pytest.fixture(scope="module")
def healthy(evaluated) -> dict[str, Any]:
    return evaluated("healthy", PROMPTS, "--evaluation.strengths", "[0.0]")


def test_the_axes_of_a_healthy_adapter_move_as_ground_truth_says(healthy):
    axes = primary(healthy)
    assert axes["style"]["conclusion"] == "better"
    assert axes["style"]["difference"]["low"] > 0
    assert "worse" not in {axes[axis]["conclusion"] for axis in ("align", "quality")}
    truth = {what: after - before for what, (before, after) in healthy["truth"].items()}
    assert truth.pop("Style, 0 base to 1 chalk") > 1 / 3
    words_came_true = sum(truth.values()) / len(truth)
    assert abs(words_came_true - axes["align"]["difference"]["value"]) < 0.15, "both count words that came true"


def test_strength_zero_is_the_base_bit_for_bit(healthy):
    assert healthy["strength_zero_is_base"] is True


def test_a_healthy_adapter_does_not_memorise_and_does_not_leak(healthy):
    assert healthy["memorisation"]["conclusion"] == "does not memorise"
    (plain,) = [one["ratio"]["value"] for one in healthy["bleed"] if one["prompt_set"] == "plain"]
    assert abs(plain) <= 0.2


def test_an_adapter_overtrained_on_three_clips_is_flagged(evaluated):
    found = evaluated("overtrained", 4)
    assert found["memorisation"]["conclusion"] == "memorises"
    assert found["verdict"]["worked"] is False
    assert "replays its training clips" in found["verdict"]["headline"]


def test_an_adapter_of_exchanged_captions_fails_alignment(evaluated):
    found = evaluated("shuffled", FEW, "--evaluation.training_captions", "0")  # those are asked for copies alone
    axes = primary(found)
    assert axes["align"]["conclusion"] == "worse"
    assert found["verdict"]["worked"] is False
