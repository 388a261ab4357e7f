"""Going on: an interrupted run ends where an uninterrupted one does, bit for bit, with everything random switched on."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from synthetic import counterpart, distance, make_run, records, same_tensors

from mochi_lora.cli import main
from mochi_lora.runs.events import RunEvents
from mochi_lora.runs.previews import Previews
from mochi_lora.training.batches import SampleSource
from mochi_lora.training.stopping import StopFlag

STEPS = 10
EVERYTHING = {
    "adapter": {"dropout": 0.1},
    "objective": {"sigma": "stratified", "strata": 4, "caption_dropout": 0.3, "temporal_weight": 0.1},
    "train": {
        "steps": STEPS,
        "warmup_steps": 2,
        "gradient_accumulation": 2,
        "ema_decay": 0.9,
        "checkpoint_every": 3,
        "validate_every": 4,
    },
}


class CrashError(Exception):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny):
    """The configuration, and what an uninterrupted run made of it in `run`."""
    path = make_run(tmp_path_factory.mktemp("resume"), tiny, **EVERYTHING)
    assert main(["train", "--config", str(path)]) == 0
    return path


@pytest.fixture
def go(data, tmp_path):
    """Runs the same command again and again, in a folder of its own."""

    def train(*words: str) -> int:
        return main(["train", "--config", str(data), "--run.folder", str(tmp_path / "run"), *words])

    return train


def require_same_run(data: Path, found: Path) -> None:
    """Every figure of every step once, every adapter file, bit for bit."""
    expected = data.parent / "run"
    for kind in ("train", "heldout", "adapter"):
        assert [line for line in records(found, kind) if line["step"] in STEPS_OF[kind]] == records(expected, kind), kind
    steps = [line["step"] for line in records(found)]
    assert steps == sorted(set(steps))
    for path in sorted(expected.rglob("*.safetensors")):
        name = counterpart(path.relative_to(expected), found)
        if name.parts[0] != "checkpoints" or (found / name).exists():
            assert same_tensors(path, found / name), name


STEPS_OF = {"train": range(1, STEPS + 1), "heldout": (0, 4, 8, 10), "adapter": (3, 6, 9, 10)}


def crash_in(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int) -> None:
    """Raise instead of calling `owner.name`, which is handed the number of completed steps last."""
    original = getattr(owner, name)

    def method(self, *arguments):
        if next(argument for argument in arguments if isinstance(argument, int)) == at:
            raise CrashError
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (RunEvents, "log", 1),
        (RunEvents, "log", 3),
        (RunEvents, "log", 8),
        (RunEvents, "validate", 0),
        (RunEvents, "validate", 8),
        (RunEvents, "checkpoint", 6),
        (RunEvents, "_save_state", 0),
        (RunEvents, "_save_state", 3),
        (RunEvents, "_save_state", 9),
        (RunEvents, "_save_state", STEPS),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_run_that_crashed_ends_like_one_that_did_not(data, go, tmp_path, monkeypatch, owner, name, at):
    with monkeypatch.context() as patch:
        crash_in(patch, owner, name, at)
        with pytest.raises(CrashError):
            go()
    assert go() == 0
    require_same_run(data, tmp_path / "run")


def test_videos_in_between_and_a_crash_inside_them_change_nothing(data, go, tmp_path, monkeypatch):
    words = ["--train.sample_every", "6"]
    for at in (0, 6, STEPS):
        with monkeypatch.context() as patch:
            crash_in(patch, Previews, "make", at)
            with pytest.raises(CrashError):
                go(*words)
    assert go(*words) == 0
    require_same_run(data, tmp_path / "run")
    assert [line["step"] for line in records(tmp_path / "run", "sample")] == [0, 6, STEPS]


def stop_with(monkeypatch: pytest.MonkeyPatch, number: int, at: int) -> None:
    original = RunEvents.log

    def log(self, done, *arguments):
        original(self, done, *arguments)
        if done == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunEvents, "log", log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_says_so_and_is_no_success(data, go, tmp_path, monkeypatch, capfd, number):
    with monkeypatch.context() as patch:
        stop_with(patch, number, at=4)
        with pytest.raises(SystemExit) as stopped:
            go()
    assert stopped.value.code == 128 + number
    told = capfd.readouterr()
    assert f"stopped by {number.name} after step 5, which is saved; the same command continues" in told.out
    assert "stopping after this step" in told.err
    run = tmp_path / "run"
    assert (run / "checkpoints" / "step-000005").is_dir()
    assert not (run / "adapter.safetensors").exists(), "it is not finished"
    assert go() == 0
    assert "continuing at step 5" in capfd.readouterr().out
    require_same_run(data, run)


def test_a_signal_in_the_last_step_comes_too_late_to_stop_anything(data, go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_with(patch, signal.SIGTERM, at=STEPS - 1)
        assert go() == 0
    require_same_run(data, tmp_path / "run")


def test_a_run_stopped_after_every_single_step_is_still_the_same_run(data, go, tmp_path, monkeypatch):
    def always(stop: StopFlag) -> bool:
        stop.requested = signal.SIGTERM
        return True

    for done in range(STEPS - 1):
        with monkeypatch.context() as patch:
            patch.setattr(StopFlag, "agreed", always)
            with pytest.raises(SystemExit):
                go()
        assert (tmp_path / "run" / "checkpoints" / f"step-{done + 1:06d}").is_dir()
    assert go() == 0
    require_same_run(data, tmp_path / "run")


def test_the_samples_after_going_on_are_the_rest_of_the_samples(data, go, tmp_path, monkeypatch):
    drawn: list[tuple] = []
    original = SampleSource.batch

    def batch(self, items, positions):
        found = original(self, items, positions)
        drawn.append((positions, found.clips, found.sigmas, found.text.lengths))
        return found

    monkeypatch.setattr(SampleSource, "batch", batch)
    assert go() == 0
    straight, drawn[:] = list(drawn), []
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        crash_in(patch, RunEvents, "log", 8)
        with pytest.raises(CrashError):
            go()
    first, drawn[:] = list(drawn), []
    assert go() == 0
    assert [positions for positions, *_ in straight] == [(number,) for number in range(2 * STEPS)]
    assert first == straight[:16]
    assert drawn == straight[12:], "from the checkpoint of step 6 on, two samples a step"


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_training_in_two_halves_is_training_at_once(data, go, tmp_path, optimizer):
    """With a constant rate the number of steps enters nothing else."""
    words = ["--train.lr_schedule", "constant", "--train.optimizer", optimizer]
    whole = tmp_path / "whole"
    try:
        assert go(*words, "--run.folder", str(whole)) == 0
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"{optimizer} does not run here: {error}")
    assert go(*words, "--train.steps", "5") == 0
    assert go(*words) == 0
    assert records(tmp_path / "run") == records(whole)
    assert same_tensors(tmp_path / "run" / "adapter.safetensors", whole / "adapter.safetensors")


def test_a_damaged_newest_state_costs_its_steps_and_nothing_else(data, go, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        crash_in(patch, RunEvents, "log", 8)
        with pytest.raises(CrashError):
            go()
    state = tmp_path / "run" / "checkpoints" / "step-000006" / "ema.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    capsys.readouterr()
    assert go() == 0
    told = capsys.readouterr().out
    assert "step-000006: damaged checkpoint (ema.safetensors does not match its checksum); trying the checkpoint before" in told
    assert "continuing at step 3" in told
    require_same_run(data, tmp_path / "run")


def test_micro_steps_may_be_cut_otherwise_on_the_way(data, go, tmp_path, monkeypatch):
    """Samples per step are the run's identity; how they share memory is this machine's. Without dropout, which is cut too."""
    words = ["--adapter.dropout", "0"]
    assert go(*words, "--run.folder", str(tmp_path / "straight")) == 0
    with monkeypatch.context() as patch:
        crash_in(patch, RunEvents, "log", 8)
        with pytest.raises(CrashError):
            go(*words)
    assert go(*words, "--train.batch_size", "2", "--train.gradient_accumulation", "1") == 0
    assert distance(tmp_path / "run" / "adapter.safetensors", tmp_path / "straight" / "adapter.safetensors") < 1e-5
