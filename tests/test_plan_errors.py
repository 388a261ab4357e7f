"""The table of errors: which plans are in it, of which models, and that its figures mean something."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from mochi_lora.config.engine import Mode
from mochi_lora.engine import flash4
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import Precision

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import plan_errors  # noqa: E402
import result_tables  # noqa: E402
import train_step  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def tiny():
    return plan_errors.trained_tiny(CPU)


def plans_on(device: torch.device, subject: plan_errors.Subject, monkeypatch, *, has_flash4: bool = True) -> list[Plan]:
    monkeypatch.setattr(plan_errors, "precisions_of", lambda _: get_args(Precision))
    monkeypatch.setattr(flash4, "refusal", lambda _: None if has_flash4 and device == CUDA else "not here")
    return plan_errors.plans(device, subject)


def test_every_choice_is_in_the_table_once(tiny, monkeypatch):
    for device, kernels in (
        (CPU, {"auto", "flash", "math"}),
        (CUDA, {"cudnn", "flash4", "flash", "efficient", "math", "auto"}),
    ):
        found = plans_on(device, tiny, monkeypatch)
        assert len(set(found)) == len(found)
        assert {plan.precision for plan in found} == set(get_args(Precision))
        assert {plan.attention for plan in found} == kernels
        for compiled in (False, True):
            exact = [plan for plan in found if plan.precision == "bf16" and plan.compile == compiled]
            assert {plan.checkpointing for plan in exact} == set(get_args(Mode))
        assert {plan.block_swap for plan in found} == {0, tiny.depth}


def test_the_plans_behind_the_fastest_step_are_in_the_table(tiny, monkeypatch):
    """What steps of 37 frames are measured with; a model of random weights is another one in float32, so that is left out."""
    found = plans_on(CUDA, replace(tiny, exact=False), monkeypatch)
    for precision in ("fp8", "bf16"):
        assert Plan("cuda", precision, "flash4", "none", compile=True) in found
    assert "fp32" not in {plan.precision for plan in found}
    without = plans_on(CUDA, tiny, monkeypatch, has_flash4=False)
    assert Plan("cuda", "fp8", "cudnn", "none", compile=True) in without
    assert "flash4" not in {plan.attention for plan in without}


def test_errors_of_the_tiny_model_are_in_the_order_of_what_is_rounded(tiny):
    """Its own gates, real clips and sentences of two lengths; what computes the same again differs in nothing."""
    assert 0 < tiny.gate < 1
    latents, _, text = tiny.inputs
    assert latents.isfinite().all()
    assert 0.5 < float(latents.std()) < 2
    assert len(set(text.lengths)) == len(text.lengths) == 2
    exact = Plan("cpu", "bf16", "auto", "none")
    reference = plan_errors.outcome(tiny, exact)
    same = [replace(exact, checkpointing="attention_saved"), replace(exact, block_swap=tiny.depth)]
    assert all(plan_errors.errors(plan_errors.outcome(tiny, plan), reference)["gradient_error"] < 1e-6 for plan in same)
    plans = [replace(exact, precision=name) for name in ("int8", "fp8", "nf4")]
    found = [plan_errors.errors(plan_errors.outcome(tiny, plan), reference) for plan in plans]
    for name in ("velocity_error", "gradient_error"):
        low, middle, high = (line[name] for line in found)
        assert 0 < low < middle < high < 1


def test_a_plan_that_fails_is_a_line_and_the_next_one_runs(tiny, tmp_path, monkeypatch):
    exact, wrong = Plan("cpu", "bf16", "auto", "none"), Plan("cpu", "bf16", "flash4", "none")
    found = torch.ones(2), {"one": torch.ones(2)}

    def outcome(_subject, plan):
        assert plan != wrong, "head size 32"
        return found

    monkeypatch.setattr(plan_errors, "trained_tiny", lambda _: tiny)
    monkeypatch.setattr(plan_errors, "plans", lambda *_: [wrong, exact])
    monkeypatch.setattr(plan_errors, "outcome", outcome)
    output = tmp_path / "lines.jsonl"
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--errors", "tiny", "--errors-output", str(output)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_step, "expand_segments", lambda: None)
    train_step.main()
    failed, ran = (json.loads(line) for line in output.read_text().splitlines())
    assert failed["error"].startswith("AssertionError: head size 32")
    assert (ran["model"], ran["gate"], ran["velocity_error"]) == ("mochi-tiny", tiny.gate, 0)


def test_the_first_lines_which_name_no_model_are_of_full_width(tmp_path, monkeypatch):
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    figures = dict.fromkeys(("velocity_error", "gradient_error", "worst_gradient_error"), 0.021)
    old = {"gpu": "H200", "gate": 0.1, "plan": asdict(Plan("cuda", "fp8", "cudnn", "none"))} | figures
    tiny = old | {"gpu": "none (CPU)", "model": "mochi-tiny", "gate": 0.59}
    again = old | {"model": "full width", "velocity_error": 0.5}
    (tmp_path / "plan_errors.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (old, tiny, again)))
    first, second = result_tables.table("plan_errors").splitlines()[2:]
    plan = "precision fp8, attention cudnn, checkpointing none"
    assert first == f"| full width | H200 | 0.1 | {plan} | 5.0e-01 | 2.1e-02 | 2.1e-02 |", "the newest of one case"
    assert second == f"| mochi-tiny | none (CPU) | 0.59 | {plan} | 2.1e-02 | 2.1e-02 | 2.1e-02 |"
