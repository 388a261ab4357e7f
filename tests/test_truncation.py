"""Lower ranks: the best there is, with the loss that is reported; and the norms by which it is measured."""

import math

import pytest
import torch
from inputs import normal, relative
from low_rank import product

from mochi_lora.errors import UserError
from mochi_lora.interop.factors import Factors, difference, distance, is_nothing, norm, trimmed
from mochi_lora.interop.truncation import truncate


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 6)])
def test_the_nearest_matrix_of_a_rank_is_found(shape: tuple[int, int]) -> None:
    part = product(*shape, rank=8)
    values = torch.linalg.svdvals(part.delta().double())
    found = truncate(part, 3)
    assert found.rank == 3
    error = float((part.delta().double() - found.delta().double()).norm())
    assert error == pytest.approx(float(values[3:].norm()), rel=1e-5)
    assert difference({"x": part}, {"x": found}).by_layer["x"] == pytest.approx(error / float(values.norm()), rel=1e-5)


def test_a_rank_that_is_not_exceeded_changes_nothing() -> None:
    part = product(40, 30, rank=3)
    assert truncate(part, 3) is part
    assert truncate(part, 8) is part


def test_a_hidden_low_rank_costs_nothing() -> None:
    """Rank 8 on paper, 2 in truth."""
    core = product(40, 30, rank=2)
    mixing = normal(8, 2, seed=5)
    part = Factors(mixing @ core.a, core.b @ torch.linalg.pinv(mixing))
    assert relative(truncate(part, 2).delta(), part.delta()) < 1e-5


def test_outputs_that_nothing_reaches_stay_untouched() -> None:
    part = product(40, 30, rank=6)
    part.b[:10] = 0
    assert not truncate(part, 2).b[:10].any()


def test_both_factors_carry_the_same_weight() -> None:
    found = truncate(product(40, 30, rank=8), 3)
    torch.testing.assert_close(found.a.norm(dim=1), found.b.norm(dim=0))


def test_norms_and_distances_are_those_of_the_matrices() -> None:
    one, other = product(40, 30, rank=4), product(40, 30, rank=9, seed=3)
    assert norm(one) == pytest.approx(float(one.delta().norm()), rel=1e-5)
    assert distance(one, other) == pytest.approx(float((one.delta() - other.delta()).norm()), rel=1e-5)
    assert distance(None, other) == norm(other)
    assert distance(one, Factors(-one.a, -one.b)) < 1e-9 * norm(one)


def test_a_layer_in_one_adapter_only_is_a_whole_difference() -> None:
    one = {"x": product(6, 5, 2), "y": product(6, 5, 2)}
    assert difference(one, {"x": one["x"]}).by_layer == {"x": pytest.approx(0, abs=1e-12), "y": 1.0}
    assert difference({"x": one["x"]}, one).by_layer["y"] == math.inf
    assert difference(one, {"x": one["x"]}).worst == ("y", 1.0)


def test_where_the_terms_cancel_a_difference_is_measured_against_what_rounding_leaves_of_them() -> None:
    """Not against the noise that is left, which any noise is as large as."""
    one = product(40, 30, rank=4)
    nothing = Factors(torch.cat([one.a, one.a]), torch.cat([one.b, -one.b], dim=1))
    assert is_nothing(nothing)
    assert not is_nothing(one)
    assert not is_nothing(Factors(1e-12 * one.a, 1e-12 * one.b)), "small, and not by cancelling"
    assert is_nothing(Factors(one.a, 0 * one.b))
    assert difference({"x": nothing}, {"x": nothing}).worst[1] < 1e-6
    bent = Factors(nothing.a, nothing.b.clone())
    bent.b[3, 1] *= 1.00001
    assert difference({"x": nothing}, {"x": bent}).worst[1] > 1e-2


def test_layers_of_different_shapes_are_not_compared() -> None:
    with pytest.raises(UserError, match=r"x: \(6, 5\) in one file, \(8, 5\) in the other"):
        difference({"x": product(6, 5, 2)}, {"x": product(8, 5, 2)})


def test_only_terms_that_are_zero_are_trimmed() -> None:
    part = product(6, 5, rank=4)
    part.a[1], part.b[:, 2] = 0, 0
    small = trimmed(part)
    assert small.rank == 2
    assert torch.equal(small.delta(), part.delta())
