"""`benchmarks/cells.sh`: every command in it is one that the benchmarks take."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import encode  # noqa: E402
import sample_step  # noqa: E402
import scale  # noqa: E402
import train_step  # noqa: E402

GROUPS = ("warm", "step37", "step85", "step163", "caps163", "stock", "errors")
GROUPS += ("vae", "exact", "folder", "text", "sample", "whole", "scale37", "scale_long")
RECORD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$RECORDED"
exit "$STATUS"
"""


def started(tmp_path: Path, groups: Sequence[str], status: int = 0) -> tuple[int, list[str]]:
    """Exit status, and the command lines that were given to Python."""
    python, recorded = tmp_path / "python3", tmp_path / "recorded"
    python.write_text(RECORD)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "RECORDED": str(recorded), "STATUS": str(status)}
    done = subprocess.run([ROOT / "benchmarks" / "cells.sh", tmp_path / "out", *groups], env=environment, check=False)
    return done.returncode, recorded.read_text().splitlines() if recorded.exists() else []


def test_every_command_is_understood(tmp_path, monkeypatch):
    status, lines = started(tmp_path, GROUPS)
    assert status == 0
    assert len(lines) > len(GROUPS)
    for line in lines:
        words = line.split()
        words = words[words.index(next(word for word in words if word.endswith(".py"))) :]
        monkeypatch.setattr(sys, "argv", words)
        module = {"train_step": train_step, "sample_step": sample_step, "encode": encode, "scale": scale}[Path(words[0]).stem]
        arguments = module._arguments() if module is encode else module.parsed()
        if module in (train_step, sample_step):
            assert train_step.cases(arguments, torch.device("cuda"))
        assert str(arguments.output).startswith("/")


@pytest.mark.parametrize(("groups", "status", "expected", "count"), [(["text", "folder"], 3, 1, 2), (["nonsense"], 0, 1, 0)])
def test_what_fails_is_told_at_the_end(tmp_path, groups, status, expected, count):
    """And a group after it runs all the same."""
    returned, lines = started(tmp_path, groups, status)
    assert (returned, len(lines)) == (expected, count)
