"""Sigma and guidance schedules, against Genmo's own numbers."""

import ast
import json
from itertools import pairwise
from pathlib import Path

import pytest

from mochi_lora.config.schedule import guidance_schedule, linear_quadratic_schedule
from mochi_lora.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sigma_schedules.json").read_text())


@pytest.mark.parametrize("case", GOLDEN)
def test_schedules_equal_genmos_to_the_last_bit(case: str) -> None:
    steps, threshold, linear = ast.literal_eval(case)
    assert linear_quadratic_schedule(steps, threshold, linear) == GOLDEN[case]


@pytest.mark.parametrize("steps", [2, 3, 8, 30, 64, 100])
def test_sigma_falls_from_noise_to_data_in_the_asked_number_of_steps(steps: int) -> None:
    sigmas = linear_quadratic_schedule(steps)
    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert all(earlier > later for earlier, later in pairwise(sigmas))


@pytest.mark.parametrize("linear", [0, 8, 9])
def test_a_linear_part_that_leaves_no_quadratic_one_is_refused(linear: int) -> None:
    with pytest.raises(UserError, match=f"linear_steps {linear} of 8"):
        linear_quadratic_schedule(8, 0.1, linear)


def test_one_step_is_refused_instead_of_dividing_by_zero() -> None:
    with pytest.raises(UserError, match="of 1 steps"):
        linear_quadratic_schedule(1)


@pytest.mark.parametrize("threshold", [0.9, 0.0, -0.1])
def test_a_parabola_that_overshoots_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match=r"sigma does not fall .* not above the linear share, 0\.5"):
        linear_quadratic_schedule(64, threshold)


def test_one_guidance_scale_is_repeated_and_a_list_must_fit() -> None:
    assert guidance_schedule(6, 3) == [6.0, 6.0, 6.0]
    assert guidance_schedule([1, 4.5, 6], 3) == [1.0, 4.5, 6.0]
    with pytest.raises(UserError, match="2 values for 3 steps"):
        guidance_schedule([4.5, 6.0], 3)
