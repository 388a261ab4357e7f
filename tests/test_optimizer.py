"""Optimiser: the learning rate's course, and the gate that a non-finite step does not pass."""

import itertools

import pytest
import torch
from torch import nn

from mochi_lora.config.schema import TrainConfig
from mochi_lora.errors import UserError
from mochi_lora.training.optimizer import build_optimizer, learning_rate, step_if_finite

YES, NO = torch.tensor([1, 0], dtype=torch.bool)


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 100, "warmup_steps": 10, "learning_rate": 0.1, **changes})


def rates(**changes) -> list[float]:
    made = settings(**changes)
    return [learning_rate(made, step) for step in range(made.steps)]


def test_the_warm_up_rises_by_equal_parts_and_its_first_step_is_not_lost():
    assert rates()[:10] == pytest.approx([0.01 * step for step in range(1, 11)])
    assert rates(warmup_steps=0)[0] == 0.1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_schedule_starts_at_the_peak_and_almost_reaches_zero_without_wasting_the_last_step(schedule):
    course = rates(lr_schedule=schedule)[10:]
    assert course[0] == 0.1
    assert 0 < course[-1] < 0.1 / 80
    assert all(later < earlier for earlier, later in itertools.pairwise(course))


def test_the_schedules_have_their_shapes():
    assert rates(lr_schedule="constant")[10:] == [0.1] * 90
    assert rates(lr_schedule="linear")[55] == pytest.approx(0.05)
    assert rates(lr_schedule="cosine")[55] == pytest.approx(0.05)
    assert rates(lr_schedule="cosine")[10 + 30] == pytest.approx(0.1 * (1 + 0.5) / 2), "a third of the way: cos 60 degrees"


def stepped(name: str, finites: list[torch.Tensor]) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter large enough for 8-bit states (4096 elements) after one step per verdict; a refused gradient is NaN."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 128))
    optimizer = build_optimizer(settings(optimizer=name), [parameter])
    for number, finite in enumerate(finites):
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(64, 128, generator=generator) if finite else torch.full((64, 128), float("nan"))
        try:
            step_if_finite(optimizer, finite, 0.01)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"{name} does not run here: {error}")
    return parameter, optimizer


def flat(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State of the one parameter; bitsandbytes nests its quantisation tables one level deeper."""
    found = {}
    for key, value in optimizer.state_dict()["state"][0].items():
        found |= value if isinstance(value, dict) else {key: value}
    return {key: torch.as_tensor(value) for key, value in found.items()}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_non_finite_step_changes_neither_weights_nor_optimiser_state(name):
    taken, refused = stepped(name, [YES, YES]), stepped(name, [YES, YES, NO])
    assert torch.equal(taken[0], refused[0])
    before, after = flat(taken[1]), flat(refused[1])
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert not torch.equal(taken[0], stepped(name, [YES])[0]), "and a finite one does change them"


def test_the_first_step_may_be_the_bad_one():
    taken, refused = stepped("adamw", [YES]), stepped("adamw", [NO])
    torch.manual_seed(0)
    assert torch.equal(refused[0], torch.randn(64, 128))
    assert not torch.equal(taken[0], refused[0])
    assert float(flat(refused[1])["step"]) == 0
    assert not flat(refused[1])["exp_avg"].any()


def test_adamw_is_the_published_one():
    """One step by hand: decay first, then the bias-corrected moments (Loshchilov and Hutter, arXiv 1711.05101)."""
    made = settings(weight_decay=0.1, betas=(0.8, 0.9), epsilon=1e-3)
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(made, [parameter])
    parameter.grad = torch.tensor([0.5])
    step_if_finite(optimizer, YES, 0.01)
    assert parameter.item() == pytest.approx(2.0 * (1 - 0.01 * 0.1) - 0.01 * 0.5 / (0.5 + 1e-3), rel=1e-6)


def test_an_8_bit_optimiser_without_bitsandbytes_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"train\.optimizer: paged_adamw8bit needs bitsandbytes.*use adamw"):
        build_optimizer(settings(optimizer="paged_adamw8bit"), [nn.Parameter(torch.zeros(2))])
