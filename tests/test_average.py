"""Moving average: its recurrence, its gate, and that lending it leaves nothing behind."""

import pytest
import torch
from torch import nn

from mochi_lora.training.average import MovingAverage

YES, NO = torch.tensor([1, 0], dtype=torch.bool)


def parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2, 2))}


def fill(found: dict[str, nn.Parameter], value: float) -> None:
    for parameter in found.values():
        parameter.data.fill_(value)


def test_it_follows_the_recurrence_with_its_warm_up():
    found = parameters()
    average = MovingAverage(found, 0.9)
    expected = 0.0
    for step in range(100):
        fill(found, float(step))
        average.update(step, YES)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.shadow["a"].tolist() == pytest.approx([expected] * 3, rel=1e-5)
    assert 80 < expected < 99, "it lags, and not by much"


def test_a_constant_is_its_own_average():
    found = parameters()
    fill(found, 0.3)
    average = MovingAverage(found, 0.99)
    for step in range(20):
        average.update(step, YES)
    assert torch.equal(average.shadow["b"], torch.full((2, 2), 0.3))


def test_a_non_finite_step_does_not_enter():
    found = parameters()
    average = MovingAverage(found, 0.9)
    fill(found, 1.0)
    average.update(5, NO)
    assert not average.shadow["a"].any()
    average.update(5, YES)
    assert average.shadow["a"].all()


def test_the_model_gets_its_own_weights_back_even_after_an_error():
    found = parameters()
    average = MovingAverage(found, 0.9)
    fill(found, 1.0)
    addresses = [parameter.data_ptr() for parameter in found.values()]
    with pytest.raises(KeyError, match="'lent'"), average.lent():
        raise KeyError("lent" if not found["a"].any() else "not lent")
    assert found["a"].tolist() == [1, 1, 1]
    assert addresses == [parameter.data_ptr() for parameter in found.values()], "optimisers and DDP hold these tensors"


def test_a_saved_average_goes_on_where_it_was():
    found = parameters()
    average, again = MovingAverage(found, 0.9), MovingAverage(parameters(), 0.9)
    fill(found, 1.0)
    average.update(3, YES)
    again.load(average.shadow)
    assert torch.equal(again.shadow["a"], average.shadow["a"])
    assert again.shadow["a"] is not average.shadow["a"]
    with pytest.raises(AssertionError, match="another adapter"):
        again.load({"c": torch.zeros(1)})
