"""Documentation tables are what the committed results say, and the benchmark itself runs (tiny, on a CPU)."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mochi_lora.engine import footprint
from mochi_lora.engine.plan import Plan

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
import fit_plan  # noqa: E402
import tables  # noqa: E402
import train_step  # noqa: E402


@pytest.mark.slow  # the plans of all cards take half a minute
@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_documentation_tables_follow_from_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert tables.filled(text) == text, "out of date: run python benchmarks/tables.py"


def test_a_table_that_was_edited_by_hand_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: plan_errors -->\nby hand\n<!-- end table -->\n")
    run = subprocess.run([sys.executable, "benchmarks/tables.py", "--check", page], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "out of date" in run.stdout


def test_sampling_steps_are_tabled_when_there_are_any_the_newest_of_each_case(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.table("sample_step") == "Not measured yet.\n"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    line = {"sampler": "mochi-lora", "adapter": "attached", "gpu": "H200", "frames": 37, "height": 480, "width": 848,
            "steps": 5, "memory_cap_gib": None,
            "peak_gib": 21.0, "allocated_gib": 20.0, "tokens_per_second": 4e4, "predicted": None,
            "plan": asdict(Plan("cuda", "bf16", "flash4", "none", compile=True))}  # fmt: skip
    seconds = [{"step_seconds": dict.fromkeys(("min", "median", "max"), found)} for found in (0.9, 0.6)]
    whole = {"sampler": "mochi-lora, embeddings to mp4", "part_seconds": {}}
    lines = [line | seconds[0], line | seconds[1], line | seconds[0] | {"adapter": "none"}, whole]
    results = tmp_path / "benchmarks" / "results" / "sample_step.jsonl"
    results.write_text("".join(json.dumps(item) + "\n" for item in lines))
    _, _, first, second = tables.table("sample_step").splitlines()
    assert "| 0.60 (" in first
    assert first.endswith("| attached |")
    assert "| 0.90 (" in second
    assert second.endswith("| none |")


def test_constants_fitted_on_half_of_the_cells_predict_the_others():
    found = fit_plan.cells([RESULTS / name for name in fit_plan.FILES])
    fitted, others = found[::2], found[1::2]
    assert len(others) >= 5
    constants = fit_plan.fit(fitted, replace(footprint.fitted(), kept_eager=40.0, moved_compiled=150.0))
    assert abs(constants.kept_eager - 30) < 4
    for name, memory, seconds in fit_plan.errors(others, constants):
        assert abs(memory) < 0.08, name
        assert abs(seconds) < 0.15, name


def test_a_plan_is_read_from_words_and_a_strange_part_is_refused():
    cpu = torch.device("cpu")
    plan = train_step._plan("precision=fp8,checkpointing=attention_saved:36,none,block_swap=4,compile=true", cpu)
    assert plan == Plan("cpu", "fp8", "auto", "attention_saved:36,none", 4, compile=True)
    assert train_step._plan_of({"compile": False, "block_swap": 2}, cpu) == Plan("cpu", "bf16", "auto", "full", 2)
    with pytest.raises(ValueError, match="swap: no part of a plan; they are device, precision"):
        train_step._plan("swap=4", cpu)
    with pytest.raises(ValueError, match="is not understood"):
        train_step._plan("checkpointing=half", cpu)


def test_time_in_which_a_kernel_runs_counts_once():
    assert train_step.busy_seconds([(0, 10**9), (5 * 10**8, 2 * 10**9), (3 * 10**9, 4 * 10**9)]) == 3.0
    assert train_step.busy_seconds([(0, 4 * 10**9), (10**9, 2 * 10**9)]) == 4.0


def test_every_committed_line_has_the_agreed_fields():
    fields = {
        "benchmark", "gpu", "world_size", "frames", "height", "width", "plan", "memory_cap_gib", "step_seconds", "steps",
        "peak_gib", "allocated_gib", "tokens_per_second", "versions",
    }  # fmt: skip
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/train_step.jsonl").read_text().splitlines()]
    assert lines
    for line in (line for line in lines if "error" not in line):
        assert fields <= line.keys()
        assert line["finite"]


@pytest.mark.slow
def test_the_encode_benchmark_holds_ours_against_diffusers_on_a_small_vae(tmp_path):
    output = tmp_path / "lines.jsonl"
    command = [
        sys.executable,
        "benchmarks/encode.py",
        "--frames",
        "7",
        "13",
        "--height",
        "32",
        "--width",
        "48",
        "--channels",
        "32",
    ]
    command += ["--precision", "fp32", "--steps", "2", "--chunk", "30000", "--exact", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    cases = [(line["what"], line["implementation"], line["frames"]) for line in lines]
    assert cases == [
        (what, name, frames) for what in ("encode", "decode") for name in ("diffusers", "mochi-lora") for frames in (7, 13)
    ]
    for line in lines:
        assert line["finite"]
        assert line["clip_seconds"]["min"] > 0
        assert line["error"] < 1e-5
        if line["implementation"] == "mochi-lora":
            assert line["difference"] < 1e-5


@pytest.mark.slow
def test_the_step_benchmark_runs_both_trainers_on_a_small_model(tmp_path):
    output = tmp_path / "lines.jsonl"
    command = [sys.executable, "benchmarks/train_step.py", "--frames", "7", "--height", "32", "--width", "48", "--layers", "2"]
    command += ["--heads", "6", "--steps", "2", "--warmup", "1", "--stock"]
    command += [
        "--plan",
        "precision=fp32,checkpointing=none",
        "--plan",
        "precision=fp8,checkpointing=full:1,offload,block_swap=1",
    ]
    run = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["trainer"] for line in lines] == ["mochi-lora", "mochi-lora", "diffusers"]
    assert [line["plan"]["block_swap"] for line in lines] == [0, 1, 0]
    assert all(line["finite"] and line["step_seconds"]["median"] > 0 for line in lines)


@pytest.mark.slow
def test_the_sampling_benchmark_makes_the_same_step_in_every_form(tmp_path):
    """One pass or two, adapter beside the weights or in them, swapped or not, by diffusers: B is zero, so all agree."""
    output = tmp_path / "lines.jsonl"
    command = [sys.executable, "benchmarks/sample_step.py", "--frames", "7", "--height", "32", "--width", "48", "--layers", "2"]
    command += ["--heads", "2", "--steps", "1", "--warmup", "1", "--stock", "--adapter", "attached", "fused", "none"]
    command += ["--plan", "precision=fp32,checkpointing=none", "--plan", "precision=fp32,block_swap=1"]
    run = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    forms = [(line["sampler"], line["plan"]["block_swap"], line["adapter"], line["plan"]["guidance_passes"]) for line in lines]
    ours = [("mochi-lora", swap, adapter, passes) for swap in (0, 1) for adapter in ("attached", "fused", "none")
            for passes in ("two", "one")]  # fmt: skip
    assert sorted(forms) == sorted([*ours, ("diffusers", 0, "attached", "one")])
    *sizes, stock = (line["latents_mean_square"] for line in sorted(lines, key=lambda line: line["sampler"] == "diffusers"))
    assert max(sizes) - min(sizes) < 3e-6 * max(sizes)
    assert stock == pytest.approx(sizes[0], rel=5e-5)  # it computes positions and the noise level otherwise
    assert all(line["finite"] and line["step_seconds"]["min"] > 0 for line in lines)


@pytest.mark.slow
def test_the_sampling_benchmark_makes_a_whole_video_of_a_small_model(tmp_path):
    output = tmp_path / "lines.jsonl"
    command = [sys.executable, "benchmarks/sample_step.py", "--frames", "7", "--height", "32", "--width", "48", "--layers", "2"]
    command += ["--heads", "2", "--steps", "2", "--whole", "--channels", "32", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (line,) = map(json.loads, output.read_text().splitlines())
    assert "error" not in line
    assert line["part_seconds"].keys() == {"denoising", "decoding", "writing"}
    assert line["finite"]
