"""What a launch goes on from: the first process picks the state, and the others see the same one, or none starts.

Every process reads the state for itself. One that read an older copy, on its own machine's disk for instance, would train
beside the others without a word, and what comes out would be wrong.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from mochi_lora.config.schema import Config
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import write_text
from mochi_lora.parallel.mesh import Ranks, gathered
from mochi_lora.runs.folder import checkpoints
from mochi_lora.runs.identity import differing_fields
from mochi_lora.runs.processes import agreed
from mochi_lora.training.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint

NOTICE_SECONDS = 10.0  # a network disk's client may take a folder for the one that it was a while ago


@dataclass(frozen=True)
class _Chosen:
    """What the first process goes on from; without a step it starts."""

    folder: Path
    mark: str  # name of a file that it has just written into that folder
    step: int | None
    manifest: str | None


@dataclass(frozen=True)
class _Sight:
    """What one process sees of the run."""

    host: str
    identity: dict[str, Any]
    amiss: list[str]  # where it is not what the first one sees


def resumed(config: Config, identity: dict[str, Any], ranks: Ranks) -> Checkpoint | None:
    """The checkpoint that the run goes on from, on every process the same; None at its first start.

    Raises UserError, on every process, where they do not see one run folder, one state and one `identity`.
    """
    if ranks.layout.world == 1:
        return newest_checkpoint(checkpoints(config))
    first = ranks.rank == 0
    found = newest_checkpoint(checkpoints(config)) if first else None
    step, manifest = (found.step, found.manifest) if found else (None, None)
    folder = config.run.folder.absolute()
    amiss: list[str] = []
    with _marked(folder) if first else nullcontext("") as mark:
        chosen = agreed(_Chosen(folder, mark, step, manifest))
        if not first:
            found, amiss = _look(folder, checkpoints(config), chosen)
        sights = gathered([_Sight(socket.gethostname(), identity, amiss)])
    if differences := _differences(sights):
        does = "starts" if chosen.step is None else f"goes on from step {chosen.step}"
        head = (
            "run.folder: the processes of this launch do not see the same run. "
            f"Rank 0 (host {sights[0].host}) {does} in {chosen.folder}"
        )
        advice = (
            "run.folder and data.cache must lie on a disk that all machines share, under one name, and every process needs the "
            "same configuration; put them there, or start on one machine"
        )
        raise UserError("\n".join([f"{head}, but", *differences, advice]))
    return found


@contextmanager
def _marked(folder: Path) -> Iterator[str]:
    """The name of a file that lies in `folder` meanwhile; `remove_abandoned` takes what a kill leaves.

    A new name each time: a network disk's client remembers which files were not there when it was last asked.
    """
    mark = folder / f"launch.tmp-{uuid4().hex}"
    write_text(mark, "")
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)


def _look(folder: Path, states: Path, chosen: _Chosen) -> tuple[Checkpoint | None, list[str]]:
    """The chosen state as this process reads it, and what is amiss."""
    found, amiss = None, []
    if not _comes(folder / chosen.mark):
        amiss.append(f"{folder}: another folder, what rank 0 wrote into its own just now is not in this one")
    if chosen.step is not None:
        try:
            found = read_checkpoint(states, chosen.step)
        except DamagedFileError as error:
            amiss.append(str(error))
        else:
            if found.manifest != chosen.manifest:
                amiss.append(f"{states}/step-{chosen.step:06d}: not the state that rank 0 has there")
    return found, amiss


def _comes(path: Path) -> bool:
    deadline = time.monotonic() + NOTICE_SECONDS
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def _differences(sights: Sequence[_Sight]) -> list[str]:
    """A line for each host and way to differ from the first process, with the ranks there."""
    expected = sights[0].identity
    alike: dict[tuple[str, str], list[int]] = {}
    for rank, sight in enumerate(sights):
        fields = differing_fields(sight.identity, expected)
        told = [f"{key}: {sight.identity.get(key)!r}, rank 0 has {expected.get(key)!r}" for key in fields]
        if told := [*sight.amiss, *told]:
            alike.setdefault((sight.host, "; ".join(told)), []).append(rank)
    return [f"  rank {', '.join(map(str, ranks))} (host {host}): {told}" for (host, told), ranks in alike.items()]
