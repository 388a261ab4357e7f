"""What `launch/` holds can be read by whom it is for. Nobody has run it: each file says so in its first comment."""

import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig

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
