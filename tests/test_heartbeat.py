"""Processes of a launch notice within a minute that one of them failed or is gone, whatever they wait for themselves."""

import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist
from adapter_files import write_adapter
from synthetic import make_run
from tiny_commands import EXAMPLES
from warm_processes import WAIT_SECONDS, Place, ended, start, wait_until

from mochi_lora.errors import UserError
from mochi_lora.parallel import heartbeat
from mochi_lora.parallel.heartbeat import RHYTHM, Heartbeat, PeerGoneError, Rhythm
from mochi_lora.runs import videos
from mochi_lora.runs.previews import Previews

QUICK = Rhythm(beat=0.02, silent=0.4, leave=0.2)
GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


class Member:
    """One process of a launch, here a thread; `said` is what it would have ended with."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.said: list[str] = []
        self.beat = Heartbeat(store, rank, world, QUICK, self.said.append)

    def leave(self, error: BaseException | None = None) -> None:
        self.beat.__exit__(type(error), error, None)


@pytest.fixture
def launch():
    """Members of one launch of so many, who have seen each other; the listed ones never came."""
    entered = []

    def of(world: int, *, without: tuple[int, ...] = (), store: dist.Store | None = None) -> dict[int, Member]:
        store = store or dist.HashStore()
        members = {rank: Member(store, rank, world) for rank in range(world) if rank not in without}
        entered.extend(members.values())
        for member in members.values():
            member.beat.__enter__()
        wait_until(lambda: all(len(member.beat._beats) == len(member.beat._watched) for member in members.values()) or without)
        return members

    yield of
    for member in entered:
        member.beat._left.set()
        member.beat._over = True


def test_a_minute_is_enough_for_all_that_it_takes():
    assert RHYTHM.silent + 2 * RHYTHM.beat + RHYTHM.leave < 60


def test_a_failure_ends_every_other_with_its_rank_and_its_first_line(launch):
    members = launch(3)
    members[2].leave(UserError("clips/a.mp4: no such file\nand more"))
    for rank in (0, 1):
        wait_until(lambda rank=rank: members[rank].said)
        (said,) = members[rank].said
        assert said.startswith(f"error: rank 2 (host {socket.gethostname()}) stopped: clips/a.mp4: no such file; rank {rank}")


def test_a_rank_that_never_came_or_fell_silent_is_told_by_its_number(launch):
    members = launch(3, without=(1,))
    for rank in (0, 2):
        wait_until(lambda rank=rank: members[rank].said)
        assert "rank 1 is gone: no sign of it for 0.4 s" in members[rank].said[0]


def test_the_others_notice_when_it_is_the_first_that_fell_silent(launch):
    members = launch(2, without=(0,))
    wait_until(lambda: members[1].said)
    assert "rank 0 is gone: no sign of it for 0.4 s" in members[1].said[0]


def test_who_is_done_is_not_missed_and_the_first_waits_for_the_others(launch):
    members = launch(2)
    first = threading.Thread(target=members[0].leave)
    first.start()
    time.sleep(4 * QUICK.beat)
    assert first.is_alive(), "the store may end with it"
    members[1].leave()
    first.join(10)
    assert not first.is_alive()
    assert members[0].said == members[1].said == []
    members = launch(2)
    members[1].leave()
    time.sleep(2 * QUICK.silent)
    assert members[0].said == []
    members[0].leave(SystemExit(143))
    assert members[0].beat._store.check(["stop"]) is False, "stopped by a signal, together"


def test_a_broken_collective_becomes_the_reason_of_the_peer_that_broke_it(launch):
    members = launch(2)
    members[1].leave(UserError("adapters/x.safetensors: no such file"))
    with pytest.raises(PeerGoneError, match=r"rank 1 \(.*\) stopped: adapters/x\.safetensors: no such file; seen here as:"):
        members[0].leave(GLOO)
    assert members[0].said == []


def test_a_broken_collective_without_a_reason_says_that_much_and_other_errors_keep_their_face(launch):
    with pytest.raises(PeerGoneError, match=r"another process of this launch is gone .*run the same command again"):
        launch(2)[0].leave(GLOO)
    launch(2)[0].leave(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Hung(dist.HashStore):
    """A store whose host stopped answering: nothing breaks, nothing comes back."""

    silent = False

    def set(self, key, value):
        while self.silent:
            time.sleep(0.01)
        super().set(key, value)


class Gone(dist.HashStore):
    """A store whose host is gone."""

    gone = False

    def set(self, key, value):
        if self.gone:
            raise dist.DistNetworkError("Connection reset by peer")
        super().set(key, value)


def test_the_store_may_be_what_is_gone(launch):
    store = Gone()
    member = Heartbeat(store, 1, 2, QUICK, (said := []).append)
    store.set("beat/0", "1 far")
    member.__enter__()
    wait_until(lambda: member._beats)
    store.gone = True
    wait_until(lambda: said)
    assert "rank 0 (host far) is gone: the launch's store does not answer (DistNetworkError: Connection reset" in said[0]


def test_a_store_that_never_answers_is_given_up_too():
    store = Hung()
    member = Heartbeat(store, 1, 2, QUICK, (said := []).append)
    with_beat = member.__enter__()
    wait_until(lambda: with_beat._rounds > 1)
    store.silent = True
    wait_until(lambda: said)
    store.silent = False
    assert "the launch's store gave no answer for 0.4 s" in said[0]


def test_who_was_away_itself_takes_nobody_for_lost():
    """A stopped process, or one whose interpreter a long call held, finds everybody's last sign to be old."""
    store = dist.HashStore()
    member = Heartbeat(store, 0, 2, QUICK, lambda _: None)
    store.set("beat/1", "1 far")
    member._round()
    member._looked -= 3600
    member._round()
    assert member._silence[1] == pytest.approx(2 * QUICK.beat)
    assert member._verdict is None


# --- commands ------------------------------------------------------------------------------------------------------------


def quick_beats() -> None:
    heartbeat.RHYTHM = Rhythm(beat=0.3, silent=3.0, leave=1.0)


def slow_first_video() -> None:
    """Rank 0 takes longer for its video than ranks wait for each other in a step."""
    decode = Previews._decode

    def slowly(self, *given):
        time.sleep(4)
        return decode(self, *given)

    if os.environ["RANK"] == "0":
        Previews._decode = slowly


def deaf() -> None:
    """Every rank says that it is at work, and sits in it as in a wait of NCCL's, which notices nobody's end."""

    def work(config, _plan, **_named):
        (config.run.folder.parent / f"at-work-{os.environ['RANK']}").touch()
        time.sleep(600)

    videos.load_sampler = work


def deaf_with_quick_beats() -> None:
    deaf()
    quick_beats()


def launched(tiny: Path, folder: Path, command: str, *words: str, second: tuple[str, ...] = (), before=None):
    """Two ranks without a launcher that would end one when the other dies; `second` are further words of rank 1 alone."""
    path = make_run(folder / "data", tiny)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = [[command, "--config", str(path), *words, *more] for more in ((), second)]
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    return [start(own[n], logs[n], place=Place(n, 2, port), before=before) for n in range(2)]


def launched_twice(tiny: Path, folder: Path, before) -> list[tuple[Path, int, list[BaseProcess]]]:
    """Two launches at once, both at work, and the folder of each: of one the first rank is the victim, of one the second."""
    made = []
    for victim in range(2):
        own = folder / f"without-{victim}"
        own.mkdir()
        made.append((own, victim, launched(tiny, own, "sample", "--base-only", before=before)))
    wait_until(lambda: all((where / "data" / f"at-work-{rank}").exists() for where, _, _ in made for rank in range(2)))
    return made


@pytest.fixture
def pair(tiny, tmp_path):
    return partial(launched, tiny, tmp_path)


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """Two launches with the settings as they are, a rank of each killed; and of the other ranks, when each ended after that.

    It takes three quarters of a minute, and no work: the slow tests ask for it first and run meanwhile, the one it is for last.
    """
    made = launched_twice(tiny, tmp_path_factory.mktemp("killed"), deaf)
    for _, victim, ranks in made:
        ranks[victim].kill()
    moment = time.monotonic()

    def seconds(rank: BaseProcess) -> float:
        wait([rank.sentinel], WAIT_SECONDS)  # only looked at: its status is read by one thread alone
        return time.monotonic() - moment

    with ThreadPoolExecutor(len(made)) as pool:
        yield [(*one, pool.submit(seconds, one[2][1 - one[1]])) for one in made]
        for _, _, ranks in made:
            for rank in ranks:
                rank.kill()
                rank.join()


def told(folder: Path, rank: int) -> str:
    return " ".join((folder / f"rank{rank}.log").read_text().split())


@pytest.mark.slow
@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize(
    ("words", "second", "reason"),
    [
        (["sample"], ["--run.folder", "nowhere"], "nowhere/adapter.safetensors: this run has no finished adapter yet"),
        (["train"], ["--data.cache", "nowhere"], "nowhere"),
        (["encode", "--data.clips", str(EXAMPLES)], ["--data.clips", "nowhere"], "nowhere"),
    ],
)
def test_an_error_of_one_rank_is_what_the_other_stops_with(pair, tiny, tmp_path, words, second, reason):
    write_adapter(tmp_path / "data" / "run" / "adapter.safetensors", tiny, 1)
    begun = time.monotonic()
    assert [ended(rank) for rank in pair(*words, second=tuple(second))] == [1, 1], told(tmp_path, 0) + told(tmp_path, 1)
    assert time.monotonic() - begun < 60
    own = told(tmp_path, 1)
    assert reason in own
    assert "rank 1 (host" in told(tmp_path, 0)
    assert reason in told(tmp_path, 0)
    assert "rank 0" not in own, "it says its own"


@pytest.mark.slow
@pytest.mark.usefixtures("killed")
def test_a_rank_that_hangs_whole_is_missed_too(tiny, tmp_path):
    """As on a machine without power: its connections stay."""
    made = launched_twice(tiny, tmp_path, deaf_with_quick_beats)
    for _, victim, ranks in made:
        os.kill(ranks[victim].pid, signal.SIGSTOP)
    for folder, victim, ranks in made:
        try:
            assert ended(ranks[1 - victim]) == 1
        finally:
            ranks[victim].kill()
            ranks[victim].join()
        assert f"error: rank {victim} (host {socket.gethostname()}) is gone: " in told(folder, 1 - victim)


@pytest.mark.slow
@pytest.mark.usefixtures("killed")
def test_a_video_may_take_longer_than_ranks_wait_for_each_other_in_a_step(pair, tmp_path):
    words = ["--train.peer_timeout_minutes", "0.05", "--train.steps", "2", "--train.sample_every", "2"]
    assert [ended(rank) for rank in pair("train", *words, before=slow_first_video)] == [0, 0], told(tmp_path, 1)
    assert (tmp_path / "data" / "run" / "samples" / "step-000002" / "sheet.png").exists()


@pytest.mark.slow
def test_a_rank_that_was_killed_is_missed_within_a_minute_by_one_that_waits_for_something_else(killed):
    """With the settings as they are. The first rank's store ends with it, which is noticed at once."""
    for folder, victim, ranks, seconds in killed:
        assert ended(ranks[1 - victim]) == 1
        assert seconds.result() < 60
        # A host that was lost before it was heard has no name.
        host = rf"( \(host {re.escape(socket.gethostname())}\))?"
        assert re.search(rf"error: rank {victim}{host} is gone: ", told(folder, 1 - victim))
