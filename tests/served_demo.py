"""The demo of a tiny Mochi, served on loopback from a thread."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from tiny_commands import settings

from mochi_lora.config.load import load_config
from mochi_lora.config.schema import Config
from mochi_lora.demo import page, serve
from mochi_lora.demo.form import Wish
from mochi_lora.demo.session import Event, Made, Progress, Session
from mochi_lora.demo.turns import Place, Turns
from mochi_lora.runs.models import load_sampler, load_text, sampling_plan
from mochi_lora.runs.videos import origin_of


def configuration(tiny: Path, folder: Path) -> tuple[list[str], Config]:
    """Its words, each with its value by `=` as the command line hands them on, and what they make."""
    pairs = [*settings(tiny, folder / "clips", folder / "cache"), "--run.folder", str(folder / "run")]
    words = [f"{name}={value}" for name, value in zip(pairs[::2], pairs[1::2], strict=True)]
    return words, load_config(Path(pairs[1]), words[1:])


def open_session(config: Config, folder: Path) -> Session:
    """On the CPU, its videos in `folder`."""
    plan, cpu = sampling_plan(config).plan, torch.device("cpu")
    folder.mkdir()
    sampler = load_sampler(config, plan, assume_alpha_is_rank=False)
    return Session(sampler, load_text(config, device=cpu), folder, origin_of(config, plan), device=cpu, offload=False)


class Gate:
    """Before a session: counts clicks and what is made, and while `shut` holds each job after its first step."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.lock = threading.Lock()
        self.shut = False
        self.begun = self.running = self.most = self.asked = 0

    def make(self, wish: Wish, report: Callable[[Event], None], cancelled: Callable[[], bool]) -> Made:
        def held(event: Event) -> None:
            report(event)
            while self.shut and isinstance(event, Progress) and event.done and not cancelled():
                time.sleep(0.01)

        with self.lock:
            self.begun, self.running = self.begun + 1, self.running + 1
            self.most = max(self.most, self.running)
        try:
            return self._session.make(wish, held, cancelled)
        finally:
            with self.lock:
                self.running -= 1


class CountedTurns(Turns):
    """Tells the gate how often a place in the line is asked for."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def place(self, owner: str) -> AbstractContextManager[Place]:
        with self._gate.lock:
            self._gate.asked += 1
        return super().place(owner)


@contextmanager
def served(offer: page.Offer, gate: Gate, password: str | None = None) -> Iterator[str]:
    """The page's address."""
    turns = CountedTurns(gate)
    with serve.open_socket("127.0.0.1", 0) as socket:
        server = serve.server_of(page.build(offer, gate.make, turns), offer.folder, password)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
        finally:
            turns.cancel_all()
            server.should_exit = True
            thread.join()
