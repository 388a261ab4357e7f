"""SIGKILL at every kind of moment, then the same command again: the same losses and the same adapter, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import counterpart, make_run, records, same_tensors
from warm_processes import Watch, ended, start, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
KINDS = ("train", "heldout", "adapter", "sample")
EVERYTHING = {
    "adapter": {"dropout": 0.1},
    "objective": {"sigma": "stratified", "strata": 4, "caption_dropout": 0.3},
    "train": {"steps": 5, "ema_decay": 0.9, "checkpoint_every": 2, "keep_checkpoints": 1, "validate_every": 3},
}
STRIDE = 3  # every third file operation; 1 takes three times as long


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny):
    """The configuration, beside what an unkilled run made of it in `run` and the number of its file operations."""
    path = make_run(tmp_path_factory.mktemp("campaign"), tiny, **EVERYTHING)
    watch = Watch(path.parent / "run", path.parent / "count")
    assert ended(start(command(path), path.parent / "log", watch=watch)) == 0
    return path


def command(path: Path, *words: str) -> list[str]:
    return ["train", "--config", str(path), *words]


def require_same_run(expected: Path, found: Path) -> None:
    for kind in KINDS:
        assert records(found, kind) == records(expected, kind), kind
    for path in sorted(expected.rglob("*.safetensors")):
        assert same_tensors(path, found / counterpart(path.relative_to(expected), found)), path

    assert names(found) == [counterpart(name, found) for name in names(expected)], (
        "nothing half-written is left, nothing is missing"
    )


def names(run: Path) -> list[Path]:
    """Everything there is; an old state may stay when the kill came between a new one and the removal of the old."""
    found = [path.relative_to(run) for path in sorted(run.rglob("*"))]
    return [path for path in found if path.parts[0] != "checkpoints" or ".tmp-" in str(path) or "step-000005" in path.parts]


def test_a_kill_at_every_file_operation_is_survived(data, tmp_path):
    operations = int((data.parent / "count").read_text())
    assert operations > 60, "folders, states, manifests, adapters, metrics"
    for kill_at in range(1, operations + 1, STRIDE):
        run = tmp_path / f"killed-at-{kill_at}"
        words, log = command(data, "--run.folder", str(run)), tmp_path / "log"
        assert ended(start(words, log, watch=Watch(run, tmp_path / "count", kill_at))) == -signal.SIGKILL
        assert ended(start(words, log)) == 0, f"killed at {kill_at}: {log.read_text()}"
        require_same_run(data.parent / "run", run)


def test_being_killed_again_and_again_comes_to_the_same_end(data, tmp_path):
    """Each life is a little longer than the one before, so that one of them gets through."""
    run = tmp_path / "run"
    words, log = command(data, "--run.folder", str(run)), tmp_path / "log"
    statuses = []
    for kill_at in range(9, 400, 13):
        statuses.append(ended(start(words, log, watch=Watch(run, tmp_path / "count", kill_at))))
        if statuses[-1] == 0:
            break
    assert statuses[-1] == 0
    assert statuses.count(-signal.SIGKILL) > 3
    require_same_run(data.parent / "run", run)


def test_a_kill_inside_a_file_of_a_checkpoint_or_of_an_adapter_is_survived(data, tmp_path):
    """Half the bytes are on disk, and no more: the writers below Python have no operations to count."""
    code = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from mochi_lora.training import checkpoint\n"
        "from mochi_lora.model import adapter_file\n"
        "room, nth = {'checkpoint': checkpoint, 'adapter': adapter_file}[sys.argv[1]], [int(sys.argv[2])]\n"
        "whole = room.save_file\n"
        "def half(tensors, path, **header):\n"
        "    whole(tensors, path, **header)\n"
        "    nth[0] -= 1\n"
        "    if nth[0] == 0:\n"
        "        os.truncate(path, Path(path).stat().st_size // 2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "room.save_file = half\n"
        "from mochi_lora.cli import main\n"
        "sys.exit(main(sys.argv[3:]))\n"
    )
    for room, nth in (("checkpoint", "4"), ("adapter", "3")):
        run = tmp_path / f"{room}-{nth}"
        words = command(data, "--run.folder", str(run))
        killed = subprocess.run([sys.executable, "-c", code, room, nth, *words], cwd=ROOT, capture_output=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert list(run.rglob("*.tmp-*"))
        assert ended(start(words, tmp_path / "log")) == 0
        require_same_run(data.parent / "run", run)


@pytest.fixture
def long(data, tmp_path):
    """Words of a run long enough to be caught at work, with loader processes, as a person starts it."""
    words = command(data, "--train.steps", "40", "--train.validate_every", "0", "--data.loader_workers", "2")
    return [*words, "--train.lr_schedule", "constant"]


def popen(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "train.py"), *words[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(program, cwd=ROOT, start_new_session=True, env=environment, **pipes)


def steps_done(run: Path) -> int:
    history = run / "metrics.jsonl"
    return history.read_bytes().count(b'"kind": "train"') if history.exists() else 0


def test_kills_from_outside_at_any_time_are_survived(long, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert ended(start([*long, "--run.folder", str(straight)], tmp_path / "log")) == 0
    words = [*long, "--run.folder", str(run)]
    for reached in (3, 25):
        process = popen(words)
        wait_until(lambda reached=reached: steps_done(run) >= reached)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    assert ended(start(words, tmp_path / "log")) == 0
    assert records(run) == records(straight)
    assert same_tensors(run / "adapter.safetensors", straight / "adapter.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_the_run_stops_it_in_good_order(long, tmp_path, number):
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach the loader processes too; those must not fail the run."""
    run = tmp_path / "run"
    words = [*long, "--run.folder", str(run)]
    process = popen(words)
    wait_until(lambda: steps_done(run) >= 5)
    os.killpg(process.pid, number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    assert f"stopped by {number.name} after step" in told
    assert "Traceback" not in told
    assert "Error" not in told
    done = steps_done(run)
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    assert done < 40
    assert ended(start(words, tmp_path / "log")) == 0
    assert [line["step"] for line in records(run)] == list(range(1, 41))
