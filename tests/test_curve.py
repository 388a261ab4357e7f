"""Which checkpoint to keep, and what is said where none can be."""

import pytest
from evaluation_rows import ALIGN, LEVELS, QUALITY, STYLE, clips, design, shifted

from mochi_lora.evaluation.curve import CheckpointClips, curve
from mochi_lora.evaluation.results import Curve

# A small gain of alignment: noise decides no case.
GOOD = {"alignment": 0.005, "quality": 0.005}


def run(changes: dict[int, dict[str, float]], *, prompts: int = 12, noise: float = 0.002, **fixed) -> Curve:
    rows = clips("base", LEVELS, prompts=prompts + 3, noise=noise)  # more than the curve has
    checkpoints = []
    for step, change in changes.items():
        rows += [
            row
            for row in clips(f"step {step}", shifted(**change), prompts=prompts + 3, noise=noise)
            if int(row.prompt.split()[-1]) < prompts
        ]
        checkpoints.append(CheckpointClips(step, f"step {step}", f"adapters/{step}.safetensors", 0.5))
    return curve(rows, checkpoints, design(**fixed))


def test_the_most_style_among_those_that_lost_nothing():
    result = run(
        {
            600: GOOD | {"style": 0.4, "alignment": -0.1},
            200: GOOD | {"style": 0.1},
            400: GOOD | {"style": 0.3},
            500: GOOD | {"style": 0.5, "quality": -0.2},
        }
    )
    assert [point.step for point in result.points] == [200, 400, 500, 600]
    assert [point.admissible for point in result.points] == [True, True, False, False]
    assert result.recommended == "adapters/400.safetensors"
    assert "step 400" in result.because
    assert "2 of 4" in result.because
    assert "cannot be told" not in result.because
    assert result.points[0].values[STYLE] > LEVELS[STYLE]
    assert result.points[0].held_out_loss == 0.5


def test_equal_style_keeps_the_earlier():
    """No noise: the two differ in nothing but the step."""
    result = run({400: GOOD | {"style": 0.3}, 200: GOOD | {"style": 0.3}, 100: GOOD}, noise=0.0)
    assert result.recommended == "adapters/200.safetensors"


def test_an_earlier_checkpoint_that_is_as_good_is_named():
    result = run({200: GOOD | {"style": 0.2999}, 400: GOOD | {"style": 0.3}}, noise=0.003)
    earlier = {"adapters/400.safetensors": "step 200 cannot be told", "adapters/200.safetensors": "step 200 has"}
    assert earlier[result.recommended] in result.because


def test_less_distance_is_more_style():
    measure = "style.distance"
    rows = clips("base", LEVELS | {measure: 0.9}) + clips("a", shifted(**GOOD) | {measure: 0.5})
    rows += clips("b", shifted(**GOOD) | {measure: 0.2})
    primaries = {**design().primaries, "style": measure}
    result = curve(rows, [CheckpointClips(1, "a", "a.file"), CheckpointClips(2, "b", "b.file")], design(primaries=primaries))
    assert result.recommended == "b.file"


def test_none_admissible_is_said():
    result = run({200: {"style": 0.3, "alignment": -0.1}})
    assert result.recommended is None
    assert "no checkpoint was shown" in result.because


def test_few_prompts_cannot_admit_anything():
    result = run({200: GOOD | {"style": 0.3}}, prompts=4)
    assert result.recommended is None
    assert "4 prompts cannot show" in result.because
    assert run({200: GOOD | {"style": 0.3}}, prompts=5).recommended is not None


@pytest.mark.parametrize("absent", [STYLE, ALIGN, QUALITY])
def test_a_primary_without_values_is_named(absent):
    rows = clips("base", LEVELS) + clips("step 1", {name: value for name, value in LEVELS.items() if name != absent})
    result = curve(rows, [CheckpointClips(1, "step 1", "one")], design())
    assert result.recommended is None
    assert absent in result.because
    assert absent not in result.points[0].values


def test_no_checkpoints_is_a_reason():
    assert curve(clips("base", LEVELS), [], design()) == Curve((), None, "there are no checkpoints to choose from")
