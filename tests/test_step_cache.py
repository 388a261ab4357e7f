"""Reused steps: when they are, and what is put in their place."""

from collections.abc import Sequence

import pytest
import torch

from mochi_lora.model.step_cache import StepCache, after_blocks, expected_change

ONES = torch.ones(1, 4, 2)
CHANGE = 0.01


def test_the_expected_change_is_the_published_polynomial() -> None:
    """By hand at 0.01: -3512.41319e-8 + 811.675948e-6 - 60.9400215e-4 + 2.42429681e-2 + 0.00305291719."""
    assert expected_change(0.01) == pytest.approx(
        -0.0000351241319 + 0.000811675948 - 0.00609400215 + 0.0242429681 + 0.00305291719
    )


def test_large_changes_are_never_expected_to_do_nothing() -> None:
    expected = [expected_change(change / 100) for change in range(1, 200)]
    assert expected == sorted(expected)
    assert expected_change(0.5) == 0.5


def ran(cache: StepCache, indicators: list[torch.Tensor]) -> list[int]:
    """Numbers of the calls that were computed."""
    computed: list[int] = []
    for number, indicator in enumerate(indicators):

        def run(_due: Sequence[int], number: int = number) -> torch.Tensor:
            computed.append(number)
            return ONES * number

        after_blocks([cache], torch.zeros_like(ONES), indicator, run)
    return computed


def test_work_is_reused_until_the_expected_changes_add_up() -> None:
    """Each step changes the indicator by 1 %, so the same is expected of each; two stay below the threshold, three do not."""
    indicators = [ONES * 1.01**number for number in range(10)]
    per_step = expected_change(CHANGE)
    cache = StepCache(2.5 * per_step, calls=10)
    assert ran(cache, indicators) == [0, 3, 6, 9]
    assert cache.reused == 6


def test_the_last_call_is_computed_even_where_nothing_changed() -> None:
    assert ran(StepCache(10.0, calls=4), [ONES] * 4) == [0, 3]


def test_a_reused_step_adds_what_the_last_computed_one_added() -> None:
    cache = StepCache(10.0, calls=3)
    first = after_blocks([cache], ONES, ONES, lambda _due: ONES * 5)
    assert torch.equal(first, ONES * 5)

    def never(_due: Sequence[int]) -> torch.Tensor:
        raise AssertionError

    assert torch.equal(after_blocks([cache], ONES * 2, ONES, never), ONES * 6)


def test_samples_of_a_batch_are_reused_and_computed_each_for_itself() -> None:
    """The first is due by its own changes while the second never is; the second was also asked once more often."""
    moving, still = StepCache(1.5 * expected_change(CHANGE), calls=10), StepCache(10.0, calls=10)
    visual, seen = torch.cat([ONES, ONES * 2]), []
    still.is_due(ONES)

    def run(due: Sequence[int]) -> torch.Tensor:
        seen.append(list(due))
        return torch.cat([visual[row : row + 1] * 10 for row in due])

    still.keep(ONES * 2, ONES * 20)
    for number in range(4):
        indicator = torch.cat([ONES * 1.01**number, ONES])
        assert torch.equal(after_blocks([moving, still], visual, indicator, run), visual * 10)
    assert seen == [[0], [0]]
    assert (moving.reused, still.reused) == (2, 4)


def test_the_change_is_relative_to_the_call_before_and_not_to_the_last_computed_one() -> None:
    """Back and forth adds up, although the input is where it was."""
    back_and_forth = [ONES * (1 + CHANGE * (number % 2)) for number in range(7)]
    computed = ran(StepCache(1.5 * expected_change(CHANGE), calls=7), back_and_forth)
    assert computed == [0, 2, 4, 6]
