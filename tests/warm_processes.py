"""Commands in processes of their own, forked from a warm server: seconds of imports are paid once, and SIGKILL is real.

A process can be told to kill itself at its n-th file operation inside a folder (Python's audit events), just before that
operation happens: mkdir, open, rename, remove. n from 1 to the last one walks through every state a kill can leave.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

# What the server has loaded before it forks.
import decord
import peft.tuners.lora.bnb
import torch
from safetensors.torch import save_file
from warm_server import warm_server

import mochi_lora.commands.caption
import mochi_lora.commands.encode
import mochi_lora.commands.evaluate
import mochi_lora.commands.export
import mochi_lora.commands.prepare
import mochi_lora.commands.sample
import mochi_lora.commands.train
from mochi_lora.cli import main
from mochi_lora.runs.events import RunEvents

WAIT_SECONDS = 120
_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
_LOADED = (decord, peft, mochi_lora)


@dataclass(frozen=True)
class Place:
    """Where in a launch a process stands, as torchrun would tell it."""

    rank: int
    ranks: int
    port: int

    def environment(self) -> dict[str, str]:
        rank, ranks = str(self.rank), str(self.ranks)
        return {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Watch:
    """File operations under `folder` are counted into `count` at the end; the `kill_at`-th is not lived to see."""

    folder: Path
    count: Path
    kill_at: int = 0


def start(
    words: list[str],
    log: Path,
    *,
    place: Place | None = None,
    watch: Watch | None = None,
    before: Callable[[], None] | None = None,
    program: Path | None = None,
) -> BaseProcess:
    """`mochi-lora`, or the script `program`, with these words; its output goes to `log`. With a place, `<log>.safetensors`
    holds its last adapter. `before`, a module's function, is called in the process first.
    """
    with warm_server() as context:
        process = context.Process(target=_run, args=(words, log, place, watch, before, program))
        process.start()
    return process


def ended(process: BaseProcess) -> int:
    """Its exit status; negative is the signal that killed it."""
    process.join(WAIT_SECONDS)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def _run(
    words: list[str],
    log: Path,
    place: Place | None,
    watch: Watch | None,
    before: Callable[[], None] | None,
    program: Path | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # the system's own again, for loader processes: it came with the fork
    if place is not None:
        os.environ.update(place.environment())
        _dump_adapters(log.with_suffix(".safetensors"))
    if before is not None:
        before()
    seen = _watched(watch) if watch is not None else [0]
    try:
        status = main(words) if program is None else _script(program, words)
    except SystemExit as stop:
        status = stop.code
    except BaseException:  # noqa: BLE001 - multiprocessing would not let it reach the log
        traceback.print_exc()
        status = 70
    if watch is not None:
        watch.count.write_text(str(seen[0]))
    sys.exit(status)


def _script(path: Path, words: list[str]) -> int:
    sys.argv = [str(path), *words]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
    return 0


def _dump_adapters(path: Path) -> None:
    """Let every rank, not the main one alone, write its adapter down where states are saved."""
    save_state = RunEvents._save_state

    def dumping(self, done):
        save_file({name: parameter.detach().clone() for name, parameter in self._learner.parameters.items()}, path)
        save_state(self, done)

    RunEvents._save_state = dumping


def _watched(watch: Watch) -> list[int]:
    seen = [0]
    inside = f"{watch.folder}/"

    def hook(event: str, arguments: tuple) -> None:
        if event in _FILE_EVENTS and f"{arguments[0]}/".startswith(inside):
            seen[0] += 1
            if seen[0] == watch.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen
