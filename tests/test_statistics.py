"""Statistics of paired differences: by hand, by algebra, and by simulation."""

import itertools
import math

import numpy as np
import pytest

from mochi_lora.evaluation.results import Tally
from mochi_lora.evaluation.statistics import (
    ALPHA,
    bootstrap_interval,
    effect_size,
    holm,
    non_inferiority_p,
    paired_differences,
    prompts_needed,
    ratio_interval,
    sign_flip_p,
    spearman,
    student_quantile,
    tally,
)


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def test_seeds_are_averaged_before_prompts_are_compared():
    base = {"a": [1.0, 3.0], "b": [0.0]}
    adapter = {"a": [2.0, 8.0], "b": [0.5]}
    assert paired_differences(base, adapter).tolist() == [3.0, 0.5]


@pytest.mark.parametrize("other", [{"b": [1.0]}, {"a": [1.0]}, {"a": [1.0, 2.0], "b": [1.0]}])
def test_what_has_no_partner_is_not_compared(other):
    with pytest.raises(AssertionError, match="both sides need the same"):
        paired_differences({"a": [1.0, 2.0]}, other)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 7, 2.3646), (0.995, 10, 3.1693), (0.975, 30, 2.0423), (0.95, 49, 1.6766)],
)
def test_students_quantiles_are_those_of_the_tables(probability, freedom, expected):
    assert student_quantile(probability, freedom) == pytest.approx(expected, abs=6e-5)


def test_the_interval_repeats_itself_and_moves_with_its_values():
    values = normal(12)
    first = bootstrap_interval(values, 5, 500)
    assert first == bootstrap_interval(values, 5, 500)
    assert first.value == pytest.approx(values.mean())
    assert first.low < first.value < first.high
    assert bootstrap_interval(values, 6, 500) != first
    moved = bootstrap_interval(10 - 3 * values, 5, 500)
    assert (moved.low, moved.high) == pytest.approx((10 - 3 * first.high, 10 - 3 * first.low))


def test_the_interval_of_many_values_has_the_size_of_the_standard_error():
    values = normal(400)
    interval = bootstrap_interval(values, 1, 4000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)


def test_more_confidence_is_a_wider_interval():
    usual, strict = (bootstrap_interval(normal(20), 1, 4000, level) for level in (0.95, 0.99))
    assert strict.low < usual.low
    assert strict.high > usual.high


def test_three_values_have_students_interval():
    """Three values have ten distinct resamples: no percentile of theirs reaches 12.7 standard errors, or 4.3."""
    interval = bootstrap_interval([1.0, 2.0, 3.0], 0)
    assert (interval.low, interval.high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)


def test_one_value_has_no_interval():
    with pytest.raises(AssertionError):
        bootstrap_interval([1.0], 0)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_the_sign_flip_test_counts_every_pattern(alternative):
    values = normal(8, seed=4) + 0.4
    sums = [sum(signs * values) for signs in itertools.product((1, -1), repeat=8)]
    more, less = (sum(side >= sum(values) - 1e-12 for side in sums), sum(side <= sum(values) + 1e-12 for side in sums))
    expected = {"greater": more, "less": less, "two-sided": 2 * min(more, less)}[alternative] / 256
    assert 0 < expected < 1
    assert sign_flip_p(values, alternative, 0) == expected


def test_patterns_that_tie_but_for_rounding_are_counted():
    assert 0.1 + 0.2 - 0.3 > 0
    assert sign_flip_p([0.1, 0.2, -0.3], "greater", 0) == 5 / 8


def test_agreement_of_all_prompts_is_as_unlikely_as_heads_in_a_row():
    assert sign_flip_p([1.0] * 10, "greater", 0) == 2**-10
    assert sign_flip_p([-1.0] * 10, "less", 0) == 2**-10
    assert sign_flip_p([0.0] * 10, "greater", 0) == 1
    assert sign_flip_p([1.0] * 30, "greater", 0) == 1 / 10_001  # drawn patterns never give 0


def test_drawn_patterns_agree_with_all_of_them():
    values = normal(20, seed=1) + 0.3
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate((sums + value, sums - value))
    exact = (sums >= values.sum()).mean()
    drawn = sign_flip_p(values, "greater", 0)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert drawn == sign_flip_p(values, "greater", 0)
    assert drawn != sign_flip_p(values, "greater", 1)


def test_non_inferiority_is_a_test_about_the_margin():
    assert non_inferiority_p([0.0] * 8, 0.1, 0) == 2**-8  # nothing changed
    assert non_inferiority_p([-0.1] * 8, 0.1, 0) == 1  # exactly the margin lost
    values = normal(9) - 0.1
    assert non_inferiority_p(values, 0.5, 0) == sign_flip_p(values + 0.5, "greater", 0)
    assert non_inferiority_p(values, 2.0, 0) < non_inferiority_p(values, 0.2, 0)
    with pytest.raises(AssertionError, match="margin"):
        non_inferiority_p(values, 0.0, 0)


def test_holm_multiplies_in_order_and_never_lets_a_larger_p_overtake():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.5, 0.001, 0.9]) == pytest.approx((1.0, 0.003, 1.0))
    assert holm([0.04]) == (0.04,)
    assert holm([]) == ()


@pytest.mark.parametrize(("tests", "two_sided", "fewest"), [(1, False, 5), (1, True, 6), (3, False, 6), (3, True, 7)])
def test_the_fewest_prompts_are_those_that_can_succeed(tests, two_sided, fewest):
    assert prompts_needed(tests, two_sided=two_sided) == fewest
    side = "two-sided" if two_sided else "greater"
    reached = [max(holm([sign_flip_p([1.0] * count, side, 0)] * tests)) for count in (fewest - 1, fewest)]
    assert reached[0] > ALPHA >= reached[1]


def test_effect_size_is_in_standard_deviations():
    assert effect_size([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert effect_size([-1.0, -2.0, -3.0]) == pytest.approx(-2.0)
    assert effect_size([0.1, 0.1, 0.1]) is None
    assert effect_size([0.3 - 0.2, 0.2 - 0.1]) is None  # equal but for rounding
    assert effect_size([0.0, 0.0]) is None
    assert effect_size([1.0]) is None


def test_a_tie_is_no_win():
    assert tally([0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 3.0, 3.5]) == Tally(better=2, equal=2, worse=1)


def test_values_that_differ_by_rounding_alone_are_a_tie():
    seeds = np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.2, 0.1])
    before, after = (side.sum() / 3 for side in seeds)
    assert before != after
    assert tally([before], [after]) == Tally(0, 1, 0)
    assert tally([0.25], [0.25 + 1e-7]) == Tally(1, 0, 0)


def test_rank_correlation_sees_order_alone():
    strengths = [0, 0.25, 0.5, 1]
    assert spearman(strengths, [1, 2, 50, 51]) == pytest.approx(1)
    assert spearman(strengths, [9, 8, 1, 0]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [5, 5, 7]) == pytest.approx(math.sqrt(3) / 2)  # ties share their mean rank
    assert spearman([1, 2, 3, 4], [5, 5, 7, 8]) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert spearman(strengths, [2, 2, 2, 2]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_a_ratio_is_that_of_the_means_and_scales():
    above, below = normal(12, 1) * 0.1 + 0.3, normal(20, 2) * 0.1 + 1
    interval = ratio_interval(above, below, 0, 2000)
    assert interval.value == pytest.approx(above.mean() / below.mean())
    assert interval.low < interval.value < interval.high
    scaled = ratio_interval(2 * above, 4 * below, 0, 2000)
    assert (scaled.low, scaled.high) == pytest.approx((interval.low / 2, interval.high / 2))
    assert scaled.high - scaled.low < 0.2


def test_a_denominator_that_may_be_zero_leaves_the_ratio_open():
    interval = ratio_interval(np.full(6, 1.0), np.array([-3, -1, 0, 1, 2, 3.0]), 0, 2000)
    assert interval.high == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 10, 20, 30, 50])
def test_intervals_of_few_prompts_miss_the_truth_as_often_as_they_say(count):
    """5.7, 5.4, 5.2, 5.4, 4.8 % of 3,000 normal samples; the plain percentile interval misses 11.1, 9.5, 7.2, 6.9, 5.5 %."""
    draw, misses, plain = np.random.default_rng(count), 0, 0
    runs = 2000
    for run in range(runs):
        values = draw.normal(size=count)
        interval = bootstrap_interval(values, run, 1000)
        misses += not interval.low <= 0 <= interval.high
        low, high = np.quantile(values[draw.integers(count, size=(1000, count))].mean(axis=1), (0.025, 0.975))
        plain += not low <= 0 <= high
    assert 0.035 < misses / runs < 0.07  # three standard errors are 1.5 %
    assert count > 10 or plain / runs > 0.08


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 15, 30])
def test_a_true_null_is_rejected_no_more_often_than_agreed(count):
    draw, runs = np.random.default_rng(count), 1500
    found = np.zeros(2)
    for run in range(runs):
        values = draw.normal(size=count)
        found += sign_flip_p(values, "two-sided", run) <= ALPHA, non_inferiority_p(values - 0.5, 0.5, run) <= ALPHA
    assert found.max() / runs < 0.067  # 5 % and three standard errors
    assert found.min() / runs > 0.03


@pytest.mark.slow
def test_ratios_hold_the_truth_as_often_as_they_say():
    draw, runs, misses = np.random.default_rng(0), 1000, 0
    for run in range(runs):
        interval = ratio_interval(draw.normal(0.1, 0.2, 10), draw.normal(0.5, 0.2, 12), run, 1000)
        misses += not interval.low <= 0.2 <= interval.high
    assert 0.03 < misses / runs < 0.075
