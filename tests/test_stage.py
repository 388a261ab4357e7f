"""A stage of pretraining: two calls are one, the learning rate's course, the average, and damaged states."""

from itertools import pairwise

import pytest
import torch

from mochi_lora.errors import DamagedFileError
from mochi_lora.tiny import stage as room
from mochi_lora.tiny.stage import Budget, Stage

BUDGET = Budget(steps=9, minutes=1000.0, warmup=3, learning_rate=0.05)
TARGET = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


class Clock:
    """A minute passes with every step."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(room, "time", Clock())
    return room.time


def make(path, outputs=2, decay=0.5):
    torch.manual_seed(3)
    return Stage(path, {"net": torch.nn.Linear(2, outputs)}, betas=(0.9, 0.99), decay=decay)


def loss_of(stage, clock):
    def loss(step):
        clock.seconds += 60
        inputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(step))
        return (stage.modules["net"](inputs) - inputs @ TARGET).square().mean()

    return loss


def run(path, clock, budget=BUDGET):
    stage = make(path)
    return stage.run(loss_of(stage, clock), budget), stage


def state(stage):
    return {**stage.modules.state_dict(prefix="now."), **stage.average.state_dict(prefix="average.")}


def test_a_run_in_two_calls_is_one_run_bit_for_bit(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(room, "_AVERAGE_FROM", 2)
    finished, whole = run(tmp_path / "whole.pt", clock)
    assert finished
    short = Budget(steps=9, minutes=4.0, warmup=3, learning_rate=0.05)
    calls = [run(tmp_path / "parts.pt", clock, short) for _ in range(3)]
    assert [(done, stage.step) for done, stage in calls] == [(False, 4), (False, 8), (True, 9)]
    expected, found = state(whole), state(calls[-1][1])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(expected["now.net.weight"], expected["average.net.weight"])


def test_a_finished_stage_takes_no_further_step(tmp_path, clock):
    run(tmp_path / "s.pt", clock)
    stage = make(tmp_path / "s.pt")

    def never(step):
        raise AssertionError(f"asked for step {step}")

    assert stage.run(never, BUDGET)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_hundredth():
    rates = [BUDGET.rate(step) for step in range(BUDGET.steps + 1)]
    assert rates[:4] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05, 0.05])
    assert all(before > after for before, after in pairwise(rates[3:]))
    assert rates[6] == pytest.approx(0.05 * 0.505)
    assert rates[9] == pytest.approx(0.0005)


def test_the_rate_reaches_the_optimiser(tmp_path, clock):
    """Adam's first step moves every weight by the learning rate."""
    before = make(tmp_path / "a.pt").modules["net"].weight.clone()
    _, stage = run(tmp_path / "b.pt", clock, Budget(steps=1, minutes=9.0, warmup=4, learning_rate=0.08))
    assert torch.allclose((stage.modules["net"].weight - before).abs(), torch.full((2, 2), 0.02), atol=1e-5)


def test_the_average_is_the_weights_themselves_until_it_may_remember(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(room, "_AVERAGE_FROM", 3)
    stage = make(tmp_path / "s.pt", decay=0.75)
    weights, averages = [], []

    def loss(step):
        weights.append(stage.modules["net"].weight.detach().clone())
        averages.append(stage.average["net"].weight.clone())
        return loss_of(stage, clock)(step)

    stage.run(loss, BUDGET)
    assert all(torch.equal(weights[step], averages[step]) for step in range(4))
    expected = weights[3]
    for now, average in zip(weights[4:], averages[4:], strict=True):
        expected = 0.75 * expected + 0.25 * now
        assert torch.allclose(average, expected, atol=1e-6)
    assert not stage.average["net"].weight.requires_grad


@pytest.mark.parametrize("damage", ["empty", "text", "torn", "tensor", "keys"])
def test_a_damaged_state_is_refused_by_name(tmp_path, clock, damage):
    path = tmp_path / "vae.pt"
    run(path, clock)
    whole = path.read_bytes()
    if damage == "tensor":
        torch.save(torch.zeros(3), path)
    elif damage == "keys":
        torch.save({"step": 3}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello there", "torn": whole[: len(whole) // 2]}[damage])
    with pytest.raises(DamagedFileError, match=r"vae\.pt: .*delete it"):
        make(path)


def test_the_state_of_other_modules_is_refused_by_name(tmp_path, clock):
    run(tmp_path / "vae.pt", clock)
    with pytest.raises(DamagedFileError, match="other modules"):
        make(tmp_path / "vae.pt", outputs=3)


def test_a_state_that_would_run_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save(Evil(), tmp_path / "vae.pt")
    with pytest.raises(DamagedFileError, match=r"(?s)readable state.*delete it"):
        make(tmp_path / "vae.pt")
    assert "ran" not in capsys.readouterr().out
