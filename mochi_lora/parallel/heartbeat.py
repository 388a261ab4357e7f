"""Signs of life between the processes of a launch, apart from what they compute together.

A collective's time-out cannot tell who is lost: it must outlast the longest honest wait, an hour for a video, days for an
encoding, and NCCL's waits end by nothing else. So every process beats in the launch's store, the first one looks for the
others' beats, the others for its own, and whoever fails leaves one line there that all of them read:

    beat/<rank>   changes every few seconds
    end/<rank>    how this rank has left: done, or failed
    stop          the first reason why the launch is over

Two threads: one talks to the store, on a connection of its own (a client that waits for an answer holds its lock), and one
ends the process, whatever the main thread or the first of the two is stuck in. Time is counted while this process itself is
awake: one that was stopped, or whose interpreter was held by a long call, takes nobody else for lost.
"""

import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch.distributed as dist

from mochi_lora.errors import UserError

_DONE = b"done"
_FAILED = 1  # what launchers take for a failure, and `mochi-lora` for a UserError


class PeerGoneError(UserError):
    """Another process of the launch failed, or did not answer."""


@dataclass(frozen=True)
class Rhythm:
    """Seconds. A lost rank is told everywhere after `silent` + 2 x `beat` + `leave`: less than a minute."""

    beat: float = 2.0
    silent: float = 40.0  # 3 s is the longest that a call was seen to hold the interpreter (pickling 3 million objects)
    leave: float = 8.0  # for the main thread to end by itself: it may be writing down what it failed at


RHYTHM = Rhythm()


class Heartbeat:
    """A context around all that the processes of a launch do together.

    While it is open, a peer that fails or falls silent ends this process with a line that names the peer. An error that
    passes through is told to the peers first; one that only says that a peer is gone becomes a `PeerGoneError` with the
    peer's own reason.
    """

    def __init__(
        self, store: dist.Store, rank: int, world: int, rhythm: Rhythm, end: Callable[[str], None] | None = None
    ) -> None:
        self._store = store
        self._rank = rank
        self._rhythm = rhythm
        self._end = end or _end_process
        self._peers = [peer for peer in range(world) if peer != rank]
        self._watched = self._peers if rank == 0 else [0]
        self._beats: dict[int, str] = {}
        self._silence = dict.fromkeys(self._watched, 0.0)
        self._ended: set[int] = set()
        self._host = socket.gethostname()
        self._rounds = 0
        self._looked = time.monotonic()
        self._turn = threading.Condition()
        self._hurried = self._over = self._at_peace = False
        self._verdict: str | None = None  # why the launch is over
        self._told: str | None = None  # what this process failed at
        self._left = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: TracebackType | None) -> None:
        lost = isinstance(error, PeerGoneError) or is_peer_error(error)
        why = self._asked() if lost else None
        self._left.set()
        self._part(None if error is None or isinstance(error, SystemExit) else _first_line(error))
        if why is not None:
            raise PeerGoneError(f"{why}; seen here as: {error}") from error
        if lost and not isinstance(error, PeerGoneError):
            raise PeerGoneError(f"another process of this launch is gone ({error}); run the same command again") from error

    def _talk(self) -> None:
        try:
            while not self._over:
                self._round()
                with self._turn:
                    self._rounds += 1
                    self._turn.notify_all()
                    # Soon again until everybody was heard: a message shall name the host of who is lost.
                    heard = len(self._beats) == len(self._watched)
                    self._turn.wait_for(lambda: self._over or self._hurried, self._rhythm.beat / (1 if heard else 10))
                    self._hurried = False
            self._farewell()
        except dist.DistError as error:  # the first process, or who started it, ends the store when it ends
            self._settle(f"{self._named(0)} is gone: the launch's store does not answer ({_first_line(error)})")

    def _round(self) -> None:
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self._rhythm.beat), now
        self._store.set(f"beat/{self._rank}", f"{self._rounds} {self._host}")
        if self._store.check(["stop"]):
            self._settle(self._store.get("stop").decode())
        for peer in self._watched:
            self._look_for(peer, passed)

    def _look_for(self, peer: int, passed: float) -> None:
        if peer in self._ended:
            return
        if self._store.check([f"end/{peer}"]):
            self._ended.add(peer)
            self._at_peace = peer == 0 and self._store.get("end/0") == _DONE
            return
        beat = self._store.get(f"beat/{peer}").decode() if self._store.check([f"beat/{peer}"]) else ""
        if beat != self._beats.get(peer, ""):
            self._beats[peer], self._silence[peer] = beat, 0.0
            return
        self._silence[peer] += passed
        if self._silence[peer] >= self._rhythm.silent and self._verdict is None:
            gone = f"{self._named(peer)} is gone: no sign of it for {self._rhythm.silent:g} s"
            self._settle(self._store.compare_set("stop", "", gone).decode())

    def _judge(self) -> None:
        """End the process where it does not end by itself."""
        seen, stuck = -1, 0.0
        while not self._left.wait(self._rhythm.beat):
            if self._verdict is not None:
                if not self._left.wait(self._rhythm.leave):
                    self._part(None)
                    self._end(f"error: {self._verdict}; rank {self._rank} leaves with it, without saving\n")
                return
            stuck = stuck + self._rhythm.beat if self._rounds == seen else 0.0
            seen = self._rounds
            if stuck >= self._rhythm.silent:
                self._settle(f"{self._named(0)} is gone: the launch's store gave no answer for {self._rhythm.silent:g} s")

    def _settle(self, verdict: str) -> None:
        """The first reason counts, and none once the first process is done: the store ends with it."""
        with self._turn:
            if self._verdict is None and not self._at_peace and not self._over:
                self._verdict = verdict
            self._turn.notify_all()

    def _asked(self) -> str | None:
        """Why the launch is over, if somebody has said so: two rounds at once, of which the second began after the question."""
        with self._turn:
            enough = self._rounds + 2
            while self._verdict is None and self._rounds < enough:
                self._hurried = True
                self._turn.notify_all()
                if not self._turn.wait(2 * self._rhythm.beat):
                    break
            return self._verdict

    def _part(self, told: str | None) -> None:
        with self._turn:
            self._over, self._told = True, told
            self._turn.notify_all()
        self._threads[0].join(self._patience() + 2 * self._rhythm.beat)

    def _patience(self) -> float:
        """How long the first process, with which the store may end, waits for the others to leave."""
        if self._rank:
            return 0.0
        return self._rhythm.leave + 2 * self._rhythm.beat if self._failed else self._rhythm.silent

    @property
    def _failed(self) -> bool:
        return self._told is not None or self._verdict is not None

    def _farewell(self) -> None:
        if self._told is not None:
            self._store.compare_set("stop", "", f"{self._named(self._rank)} stopped: {self._told}")
        self._store.set(f"end/{self._rank}", "failed" if self._failed else _DONE.decode())
        step, waited = self._rhythm.beat / 10, 0.0
        while waited < self._patience() and self._wait_for(3 * self._rhythm.beat if self._failed else math.inf, step):
            time.sleep(step)
            waited += step

    def _wait_for(self, hushed: float, passed: float) -> bool:
        """Whether a peer is still about that was heard within so many seconds."""
        for peer in self._watched:
            self._look_for(peer, passed)
        return any(peer not in self._ended and self._silence[peer] < hushed for peer in self._watched)

    def _named(self, peer: int) -> str:
        host = self._host if peer == self._rank else self._beats.get(peer, "").partition(" ")[2]
        return f"rank {peer} (host {host})" if host else f"rank {peer}"


def watch_peers(name: str) -> Heartbeat:
    """For the launch that this process has joined through its environment; `name` keeps attempts apart in one store."""
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=RHYTHM.silent)))
    return Heartbeat(dist.PrefixStore(f"heartbeat{name}", store), rank, world, RHYTHM)


def is_peer_error(error: BaseException | None) -> bool:
    """Whether a collective failed. gloo has no error class of its own; its messages carry the place in its sources."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: BaseException) -> str:
    told = (str(error).splitlines() or [""])[0]
    return told if isinstance(error, UserError) else f"{type(error).__name__}: {told}"


def _end_process(told: str) -> None:
    """At once: the main thread may never come back from a collective to take an exception, and what runs at an orderly exit
    waits for it, or for the same collective. Files are written whole or not at all, so nothing is torn.
    """
    os.write(2, told.encode())  # past Python's buffers, whose locks the main thread may hold
    os._exit(_FAILED)
