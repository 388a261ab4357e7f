"""What `launch/` holds can be read by whom it is for. Nobody has run it: each file says so in its first comment."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from torch.distributed.launcher.api import LaunchConfig
from warm_processes import wait_until

FOLDER = Path(__file__).parents[1] / "launch"


def test_every_file_says_first_that_it_is_unrun():
    files = sorted(FOLDER.iterdir())
    assert [path.name for path in files] == ["1x2.yaml", "1x8.yaml", "2x8.yaml", "slurm.sh"]
    for path in files:
        comments = [line for line in path.read_text().splitlines() if line.startswith("#") and not line.startswith("#!")]
        assert comments[0].startswith("# Unrun: "), path.name


@pytest.mark.parametrize(("name", "machines", "processes"), [("1x2", 1, 2), ("1x8", 1, 8), ("2x8", 2, 16)])
def test_accelerate_reads_its_configurations(name, machines, processes):
    read = ClusterConfig.from_yaml_file(FOLDER / f"{name}.yaml")
    assert (read.num_machines, read.num_processes) == (machines, processes)
    assert read.distributed_type.value == "MULTI_GPU"
    assert read.mixed_precision == "no", "train warns of any other: it would have no effect"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_is_a_shell_script():
    assert subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=False).returncode == 0


SRUN = """#!/bin/bash
env > "$CALLS/environment"
trap 'touch "$CALLS/told"' TERM
touch "$CALLS/started"
until [ -e "$CALLS/told" ] || [ -e "$CALLS/end" ]; do sleep 0.05; done
exit "$STATUS"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node-1; else echo "$@" >> "$CALLS/scontrol"; fi
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("out_of_time", "status", "requeued"), [(True, 143, ["requeue 77"]), (True, 0, []), (False, 1, []), (False, 0, [])]
)
def test_a_job_that_ran_out_of_time_is_told_and_requeued_and_no_other(tmp_path, out_of_time, status, requeued):
    old = out_of_time and status == 0
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", f"#!/bin/bash\nexit {int(old)}\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.mkdir()
    slurm = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "64"}
    environment = {**os.environ, **slurm, "CALLS": str(calls), "STATUS": str(status)}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    script = ["bash", str(FOLDER / "slurm.sh"), "style.yaml"]
    with subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True) as job:
        wait_until((calls / "started").exists)
        if out_of_time:
            job.send_signal(signal.SIGUSR1)
        else:
            (calls / "end").touch()
        assert job.wait(60) == status
        assert job.stderr is not None
        assert ("Take torch 2.12 or newer" in job.stderr.read()) == old
    assert (calls / "told").exists() == out_of_time
    assert ((calls / "scontrol").read_text().splitlines() if (calls / "scontrol").exists() else []) == requeued
    handed_on = (calls / "environment").read_text().splitlines()
    assert {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280", "SRUN_CPUS_PER_TASK=64"} <= set(handed_on)


def test_torchrun_reads_how_long_its_workers_may_take_to_leave(monkeypatch):
    """And the script sees by this field whether it does."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "280")
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 280
