"""One job at a time, in order of asking, each cancelled by whoever asked for it."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mochi_lora.errors import UserError
from mochi_lora.inference.sampler import Cancelled

MOST_WAITING = 16

Told = TypeVar("Told")
Result = TypeVar("Result")
# Called with somewhere to report to, and with a question: is this cancelled?
Work = Callable[[Callable[[Told], None], Callable[[], bool]], Result]


@dataclass(frozen=True)
class Waiting:
    """So many are before this one."""

    ahead: int


class AlreadyAtWorkError(UserError):
    """The owner has a job in the line already."""


@dataclass(eq=False)
class Place:
    """One job's place in the line."""

    owner: str
    cancelled: threading.Event = field(default_factory=threading.Event)


class Turns(Generic[Told, Result]):
    """A line of jobs; the first of it works. Owners are any names, each has one job at most."""

    def __init__(self) -> None:
        self._line: list[Place] = []
        self._moved = threading.Condition()

    @contextmanager
    def place(self, owner: str) -> Iterator[Place]:
        """Stand in the line. Raises AlreadyAtWorkError if `owner` does already, UserError if the line is full."""
        with self._moved:
            if self.has(owner):
                raise AlreadyAtWorkError("this page is at work already; wait for it, or cancel it")
            if len(self._line) > MOST_WAITING:
                raise UserError(f"{MOST_WAITING} others are waiting already; try again later")
            place = Place(owner)
            self._line.append(place)
        try:
            yield place
        finally:
            with self._moved:
                self._line.remove(place)
                self._moved.notify_all()

    def run(self, place: Place, work: "Work[Told, Result]") -> Generator[list[Told | Waiting], None, Result]:
        """Wait for the turn, do `work` in a thread of its own, and return its result.

        Yields what is worth telling: how many are before, then what `work` reports, together what came together. Closing
        the generator cancels. Raises Cancelled, and whatever `work` raises.
        """
        yield from self._wait(place)
        return (yield from _do(work, place.cancelled))

    def has(self, owner: str) -> bool:
        """Whether `owner` has a job in the line."""
        with self._moved:
            return any(place.owner == owner for place in self._line)

    def cancel(self, owner: str) -> None:
        """Ask the owner's job to stop, working or waiting; nothing where there is none."""
        with self._moved:
            for place in self._line:
                if place.owner == owner:
                    place.cancelled.set()
            self._moved.notify_all()

    def cancel_all(self) -> None:
        """Ask every job to stop."""
        with self._moved:
            for place in self._line:
                place.cancelled.set()
            self._moved.notify_all()

    def _wait(self, place: Place) -> Generator[list[Told | Waiting], None, None]:
        told = 0
        while True:
            with self._moved:
                while (ahead := self._line.index(place)) == told > 0 and not place.cancelled.is_set():
                    self._moved.wait()
            if place.cancelled.is_set():
                raise Cancelled
            if ahead == 0:
                return
            told = ahead
            yield [Waiting(ahead)]


def _do(work: "Work[Told, Result]", cancelled: threading.Event) -> Generator[list[Told | Waiting], None, Result]:
    reports: queue.SimpleQueue[Told | None] = queue.SimpleQueue()  # None: nothing more will come
    with ThreadPoolExecutor(1, thread_name_prefix="generation") as pool:
        future = pool.submit(work, reports.put, cancelled.is_set)
        future.add_done_callback(lambda _: reports.put(None))
        try:
            while (told := _taken_together(reports))[-1] is not None:
                yield [report for report in told if report is not None]
            if rest := [report for report in told if report is not None]:
                yield list(rest)
        finally:
            cancelled.set()  # nobody listens any more
    return future.result()


def _taken_together(reports: "queue.SimpleQueue[Told | None]") -> list[Told | None]:
    """At least one report, and all that lie there: a listener slower than the work must not fall behind."""
    taken = [reports.get()]
    while not reports.empty():
        taken.append(reports.get())
    return taken
