"""Where numbers, sample videos and adapters go. The trainer talks to a `Tracker` and knows none by name.

`metrics.jsonl` in the run folder is the truth: every record is on disk there before any tracker hears of it. Trackers are
views of it. wandb and trackio write behind one's back and lose seconds of records when the process is killed (wandb up to
its last flush, 15 s apart by default), so at opening each is asked how many records it holds and is given the rest. A
resumed run replays the steps after its checkpoint; those already in metrics.jsonl are dropped here. Together: no step
lost, none twice.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from accelerate import PartialState

from mochi_lora.config.schema import TrackingConfig
from mochi_lora.console import console
from mochi_lora.errors import DamagedFileError
from mochi_lora.files import out_of_space_named, write_json
from mochi_lora.training.tracker_backends import META, Backend, Record, Session, open_tensorboard, open_trackio, open_wandb

HISTORY = "metrics.jsonl"
IDS = "tracker_ids.json"


class Tracker(Protocol):
    """What the trainer may say. Steps of one kind must not fall, except by resuming from a checkpoint."""

    @property
    def run_ids(self) -> Mapping[str, str]:
        """Identity of the run in each tracker, to be kept in checkpoints."""

    def log(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Record numbers. `kind` tells apart what is recorded at the same step (`train`, `heldout`)."""

    def log_videos(self, step: int, videos: Mapping[str, Path]) -> None:
        """Record finished mp4 files by caption."""

    def log_adapter(self, step: int, path: Path) -> None:
        """Record an adapter file that will not change any more. Only wandb stores it, as an artifact."""

    def finish(self) -> None:
        """Hand everything over and close."""


class Silent:
    """The tracker of every process but the main one."""

    @property
    def run_ids(self) -> Mapping[str, str]:
        """None."""
        return {}

    def log(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Nothing."""

    def log_videos(self, step: int, videos: Mapping[str, Path]) -> None:
        """Nothing."""

    def log_adapter(self, step: int, path: Path) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class Trackers:
    """The main process's tracker: writes metrics.jsonl, then passes each record on. Closes itself as a context."""

    def __init__(
        self, folder: Path, records: Sequence[Record], backends: Sequence[Backend], run_ids: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._run_ids = dict(run_ids)
        self._rows = len(records)
        self._latest: dict[str, int] = {}  # highest step on disk, per kind
        for record in records:
            self._latest[record["kind"]] = max(record["step"], self._latest.get(record["kind"], -1))
        self._stream = (folder / HISTORY).open("a", encoding="utf-8")
        self._backends = [(backend, _catch_up(backend, records)) for backend in backends]

    @property
    def run_ids(self) -> Mapping[str, str]:
        """Identity of the run in each tracker: `{"wandb": ..., "trackio": ...}`, as far as they are open."""
        return self._run_ids

    def log(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Record numbers of `kind` at `step`, unless a step as high is recorded. Not finite becomes null (NaN in trackers)."""
        assert not META & values.keys(), f"{META & values.keys()} name the record itself"
        self._record(step, kind, {name: value if math.isfinite(value) else None for name, value in values.items()})

    def log_videos(self, step: int, videos: Mapping[str, Path]) -> None:
        """Record mp4 files by caption: playable in wandb and trackio, paths in TensorBoard and metrics.jsonl."""
        self._record(step, "sample", {"videos": {caption: self._relative(path) for caption, path in videos.items()}})

    def log_adapter(self, step: int, path: Path) -> None:
        """Record an adapter file: an artifact of type `model` in wandb, a path in metrics.jsonl, nothing elsewhere."""
        self._record(step, "adapter", {"adapter": self._relative(path)})

    def log_report(self, step: int, page: Path, values: Mapping[str, float], kind: str, videos: Mapping[str, Path]) -> None:
        """Record a finished HTML page with its numbers and videos: shown in wandb, paths in metrics.jsonl."""
        films = {"videos": {caption: self._relative(path) for caption, path in videos.items()}} if videos else {}
        self._record(step, kind, {"report": self._relative(page), **films, **values})

    def finish(self) -> None:
        """Close metrics.jsonl and every tracker, waiting until they have written what they were given."""
        self._stream.close()
        for backend, _ in self._backends:
            backend.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()

    def _record(self, step: int, kind: str, content: Mapping[str, Any]) -> None:
        if step <= self._latest.get(kind, -1):
            return  # replayed after a resume
        record = {"step": step, "time": round(time.time(), 3), "kind": kind, **content}
        with out_of_space_named(self._folder / HISTORY):
            self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._latest[kind] = step
        for backend, shift in self._backends:
            backend.write(self._rows + shift, record)
        self._rows += 1

    def _relative(self, path: Path) -> str:
        """Inside the run folder relative to it, so that the folder may be moved."""
        path, folder = path.resolve(), self._folder.resolve()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def open_trackers(settings: TrackingConfig, folder: Path, config: Mapping[str, Any], run_ids: Mapping[str, str]) -> Trackers:
    """Open metrics.jsonl and the configured trackers, bring them up to date; main process only.

    `config` is the run's configuration as JSON content; `run_ids` the checkpoint's, empty for a new run. A run that was
    killed before its first checkpoint finds its ids in the run folder. Raises UserError if a tracker is not installed, or
    if wandb should be online and nobody is logged in; DamagedFileError if metrics.jsonl is not readable.
    """
    PartialState()  # accelerate's trackers ask it who is the main process
    folder.mkdir(parents=True, exist_ok=True)
    records = _read_history(folder / HISTORY)
    stored = folder / IDS
    known = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    session = Session(settings=settings, folder=folder, config=config, run_ids={**known, **run_ids})
    backends = [_open(name, session) for name in dict.fromkeys(settings.trackers)]
    ids = {**session.run_ids, **{backend.name: backend.run_id for backend in backends if backend.run_id}}
    if ids != known:
        write_json(stored, ids)
    return Trackers(folder, records, backends, ids)


def _open(name: str, session: Session) -> Backend:
    match name:
        case "wandb":
            return open_wandb(session)
        case "trackio":
            return open_trackio(session)
        case _:
            assert name == "tensorboard", name
            return open_tensorboard(session)


def _catch_up(backend: Backend, records: Sequence[Record]) -> int:
    """Give the backend what it lacks; returns by how much its rows are ahead of ours (something else wrote there)."""
    held = backend.rows_held()
    for row in range(held, len(records)):
        backend.write(row, records[row])
    ahead = max(0, held - len(records))
    if ahead:
        counts = f"{backend.name}: holds {held} records, {HISTORY} {len(records)}"
        console.print(f"{counts}; going on behind them, steps may appear twice there", markup=False)
    return ahead


def _read_history(path: Path) -> list[Record]:
    """All records; a last line torn by a kill is cut off the file, or the next record would be glued to it."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            message = f"{path}: line {number} is not JSON ({error}); repair or delete that line, or begin anew with --fresh"
            raise DamagedFileError(message) from error
    return records
