"""SIGKILL at every kind of moment, then the same command again: the same losses and the same adapter, bit for bit."""

import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import pytest
from synthetic import counterpart, make_run, records, same_tensors
from warm_processes import Watch, ended, start, wait_until

from mochi_lora.files import only_one
from mochi_lora.model import adapter_file
from mochi_lora.training import checkpoint

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
    for before in (half_a_state, half_an_adapter):
        run = tmp_path / before.__name__
        words, log = command(data, "--run.folder", str(run)), tmp_path / "log"
        assert ended(start(words, log, before=before)) == -signal.SIGKILL, log.read_text()
        assert list(run.rglob("*.tmp-*"))
        assert ended(start(words, log)) == 0
        require_same_run(data.parent / "run", run)


def half_a_state() -> None:
    kill_inside(checkpoint, 4)


def half_an_adapter() -> None:
    kill_inside(adapter_file, 3)


def kill_inside(room: ModuleType, nth: int) -> None:
    """This process dies inside the n-th file that `room` saves."""
    whole, left = room.save_file, [nth]

    def half(tensors, path, **header):
        whole(tensors, path, **header)
        left[0] -= 1
        if left[0] == 0:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    room.save_file = half


@pytest.fixture
def long(data, tmp_path):
    """Words of a run long enough to be caught at work, with loader processes, as a person starts it."""
    words = command(data, "--train.steps", "40", "--train.validate_every", "0", "--data.loader_workers", "2")
    return [*words, "--train.lr_schedule", "constant"]


def launched(words: list[str], log: Path) -> BaseProcess:
    """train.py in a group of processes of its own, as a shell starts it."""
    return start(words[1:], log, before=os.setsid, program=ROOT / "train.py")


def steps_done(run: Path) -> int:
    history = run / "metrics.jsonl"
    return history.read_bytes().count(b'"kind": "train"') if history.exists() else 0


def test_kills_from_outside_at_any_time_are_survived(long, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert ended(start([*long, "--run.folder", str(straight)], tmp_path / "log")) == 0
    words = [*long, "--run.folder", str(run)]
    for reached in (3, 25):
        process = launched(words, tmp_path / "log")
        wait_until(lambda reached=reached: steps_done(run) >= reached)
        process.kill()
        assert ended(process) == -signal.SIGKILL
        with only_one(run, "training", wait=True):
            pass  # its loader processes outlive it for a moment, and hold the folder
    assert ended(start(words, tmp_path / "log")) == 0
    assert records(run) == records(straight)
    assert same_tensors(run / "adapter.safetensors", straight / "adapter.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_the_run_stops_it_in_good_order(long, tmp_path, number):
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach the loader processes too; those must not fail the run."""
    run = tmp_path / "run"
    words = [*long, "--run.folder", str(run)]
    process = launched(words, tmp_path / "stopped.log")
    wait_until(lambda: steps_done(run) >= 5)
    os.killpg(process.pid, number)
    assert ended(process) == 128 + number, (tmp_path / "stopped.log").read_text()
    told = (tmp_path / "stopped.log").read_text()
    assert f"stopped by {number.name} after step" in told
    assert "Traceback" not in told
    assert "Error" not in told
    done = steps_done(run)
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    assert done < 40
    assert ended(start(words, tmp_path / "log")) == 0
    assert [line["step"] for line in records(run)] == list(range(1, 41))
