"""Documentation tables are what the committed results say, and the benchmark itself runs (tiny, on a CPU)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_documentation_tables_follow_from_the_committed_results():
    run = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_committed_line_has_the_agreed_fields():
    fields = {
        "benchmark", "gpu", "world_size", "frames", "height", "width", "plan", "memory_cap_gib", "step_seconds", "steps",
        "peak_gib", "allocated_gib", "tokens_per_second", "versions",
    }  # fmt: skip
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/train_step.jsonl").read_text().splitlines()]
    assert lines
    for line in lines:
        assert fields <= line.keys()
        assert line["finite"]


@pytest.mark.slow
def test_the_step_benchmark_runs_both_trainers_on_a_small_model(tmp_path):
    output = tmp_path / "lines.jsonl"
    command = [sys.executable, "benchmarks/train_step.py", "--frames", "7", "--height", "32", "--width", "48", "--layers", "2"]
    command += ["--heads", "6", "--precision", "fp32", "--steps", "2", "--warmup", "1", "--trainer", "mochi-lora", "diffusers"]
    run = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["trainer"] for line in lines] == ["mochi-lora", "diffusers"]
    assert all(line["finite"] and line["step_seconds"]["median"] > 0 for line in lines)
