"""Two processes over gloo: they are one process with twice the batch, stop together, and notice when they are alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic import SMALL, distance, latents_name, make_run, posterior, records, same_tensors
from warm_processes import Place, ended, start, wait_until

from mochi_lora.data.cache import Cache
from mochi_lora.data.samples import Posterior
from mochi_lora.streams import Purpose, stream

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DROPOUT, SEED, STEPS = 0.5, 7, 6
SETTINGS = {
    "objective": {"caption_dropout": DROPOUT},
    "train": {"steps": STEPS, "validate_every": 3, "ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny):
    """The configuration, and what one process with a batch of two made of it in `run`."""
    path = make_run(tmp_path_factory.mktemp("distributed"), tiny, **SETTINGS)
    assert ended(start(["train", "--config", str(path), "--train.batch_size", "2"], path.parent / "log")) == 0
    return path


class Pair:
    """Two ranks of one launch, without a launcher that would end one when the other dies."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [folder / f"rank{rank}.log" for rank in range(2)]
        self.ranks = [start(words, self.logs[rank], place=Place(rank, 2, port)) for rank in range(2)]

    def statuses(self) -> list[int]:
        return [ended(rank) for rank in self.ranks]

    def told(self, rank: int) -> str:
        return self.logs[rank].read_text()


@pytest.fixture
def pair(data, tmp_path):
    def launch(*words: str) -> Pair:
        return Pair(tmp_path, ["train", "--config", str(data), "--run.folder", str(tmp_path / "run"), *words])

    return launch


def dropped(position: int) -> bool:
    return stream(SEED, Purpose.CAPTION_DROPOUT, position).random() < DROPOUT


def test_two_processes_are_one_with_twice_the_batch(data, pair, tmp_path):
    ways = {(dropped(2 * step), dropped(2 * step + 1)) for step in range(STEPS)}
    assert len(ways) >= 3, "a null caption on one rank only is among the steps"
    both = pair()
    assert both.statuses() == [0, 0], both.told(0) + both.told(1)
    run, expected = tmp_path / "run", data.parent / "run"
    for one, other in zip(records(run), records(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert distance(run / "adapter.safetensors", expected / "adapter.safetensors") < 1e-5
    ranks = [load_file(log.with_suffix(".safetensors")) for log in both.logs]
    assert all(torch.equal(tensor, ranks[1][name]) for name, tensor in ranks[0].items()), "the ranks do not drift apart"


def test_the_held_out_loss_does_not_depend_on_who_measures_which_clip(data, pair, tmp_path):
    assert pair().statuses() == [0, 0]
    first, expected = records(tmp_path / "run", "heldout"), records(data.parent / "run", "heldout")
    assert [line["step"] for line in first] == [0, 3, 6]
    assert first[0] == expected[0], "untrained, bit for bit"
    for one, other in zip(first, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_ranks_share_the_sample_videos(pair, tmp_path):
    both = pair("--train.sample_every", "6", "--sample.seeds", "[0, 1, 2]", "--train.steps", "2")
    assert both.statuses() == [0, 0], both.told(0) + both.told(1)
    for step in (0, 2):
        made = sorted(path.name for path in (tmp_path / "run" / "samples" / f"step-{step:06d}").iterdir())
        assert made == [*(f"{number:03d}-a-lighthouse-seed{number}.mp4" for number in range(3)), "sheet.png"]


def wait_for_steps(pair: Pair, run: Path, steps: int) -> None:
    history = run / "metrics.jsonl"
    wait_until(lambda: history.exists() and history.read_bytes().count(b'"kind": "train"') >= steps)
    assert all(rank.is_alive() for rank in pair.ranks)


LONG = ["--train.steps", "2000", "--train.validate_every", "0", "--train.checkpoint_every", "5"]


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(pair, tmp_path, told):
    both, run = pair(*LONG), tmp_path / "run"
    wait_for_steps(both, run, 3)
    os.kill(both.ranks[told].pid, signal.SIGTERM)
    assert both.statuses() == [128 + signal.SIGTERM] * 2, both.told(0) + both.told(1)
    done = records(run)[-1]["step"]
    assert f"stopped by SIGTERM after step {done}, which is saved" in both.told(0)
    state = load_file(run / "checkpoints" / f"step-{done:06d}" / "adapter.safetensors")
    for log in both.logs:
        assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(log.with_suffix(".safetensors")).items())


def test_two_ranks_stopped_and_started_again_are_two_ranks_that_went_through(pair, tmp_path):
    words = [*LONG[2:], "--train.lr_schedule", "constant", "--adapter.dropout", "0.1"]
    first, run = pair(*words, "--train.steps", "2000"), tmp_path / "run"
    wait_for_steps(first, run, 3)
    os.kill(first.ranks[0].pid, signal.SIGINT)
    assert first.statuses() == [130, 130]
    done = records(run)[-1]["step"]
    assert pair(*words, "--train.steps", str(done + 5)).statuses() == [0, 0]
    straight = tmp_path / "straight"
    assert pair(*words, "--train.steps", str(done + 5), "--run.folder", str(straight)).statuses() == [0, 0]
    assert records(run) == records(straight)
    assert same_tensors(run / "adapter.safetensors", straight / "adapter.safetensors")


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_peer_is_killed_the_other_leaves_in_time_and_saves_nothing(pair, tmp_path, victim):
    both, run = pair(*LONG, "--train.peer_timeout_minutes", "0.1"), tmp_path / "run"
    wait_for_steps(both, run, 7)
    both.ranks[victim].kill()
    killed = time.monotonic()
    survivor = 1 - victim
    assert ended(both.ranks[survivor]) == 1, both.told(survivor)
    assert time.monotonic() - killed < 60
    told = " ".join(both.told(survivor).split())
    assert "another process of this run is gone, or did not answer within train.peer_timeout_minutes=0.1" in told
    assert "nothing was saved, the last checkpoint stands: run the same command again" in told
    done = records(run)[-1]["step"]
    states = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-??????")]
    assert max(states) <= done
    assert all(state % 5 == 0 for state in states), "none was written for the step in hand"


def test_a_peer_that_hangs_is_given_up_after_the_time_out(pair, tmp_path):
    both, run = pair(*LONG, "--train.peer_timeout_minutes", "0.05"), tmp_path / "run"
    wait_for_steps(both, run, 3)
    os.kill(both.ranks[1].pid, signal.SIGSTOP)
    try:
        assert ended(both.ranks[0]) == 1, both.told(0)
        assert "did not answer within train.peer_timeout_minutes=0.05" in " ".join(both.told(0).split())
    finally:
        both.ranks[1].kill()
        both.ranks[1].join()


def test_a_non_finite_sample_of_one_rank_stops_both_and_only_its_own_names_the_clip(data, pair, tmp_path, tiny):
    path = make_run(tmp_path / "poisoned", tiny, **SETTINGS)
    cache = Cache(path.parent / "cache")
    stored = posterior(SMALL, 1)
    cache.path("latents", latents_name(1)).unlink()
    cache.write_latents(latents_name(1), Posterior(torch.full_like(stored.mean, float("nan")), stored.logvar), {})
    both = Pair(tmp_path, ["train", "--config", str(path)])
    assert both.statuses() == [1, 1]
    told = [" ".join(both.told(rank).split()) for rank in range(2)]
    assert sorted("clip-1.mp4 at sigma" in text for text in told) == [False, True]
    assert sorted("in another process, which names the clip" in text for text in told) == [False, True]
    assert len(list((path.parent / "run").glob("non-finite-step-*"))) == 1


def test_the_launcher_people_use_gives_the_same_run(data, tmp_path):
    """torchrun: `accelerate launch` without a GPU silently starts one process."""
    run = tmp_path / "run"
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    words = ["--config", str(data), "--run.folder", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*program, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("continuing") == 0
    assert done.stdout.count("next     mochi-lora sample") == 1, "only the main process talks"
    assert distance(run / "adapter.safetensors", data.parent / "run" / "adapter.safetensors") < 1e-5
