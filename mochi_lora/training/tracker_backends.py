"""wandb, trackio and TensorBoard, each through accelerate's tracker class, each as a view of metrics.jsonl.

Record number n of metrics.jsonl is row n of a backend. In wandb the row is its own `_step` and the optimiser step a value
named `step`, made the x-axis: wandb refuses rows that do not rise, so two kinds of record at one step, or a sample made
late at a resumed step, would be dropped or merged if the optimiser step were `_step`.
"""

import importlib.util
import json
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from mochi_lora.config.schema import TrackingConfig
from mochi_lora.console import console
from mochi_lora.errors import UserError, install_command

Record = dict[str, Any]
META = {"step", "time", "kind", "videos", "adapter", "report"}
_FLUSH_SECONDS = 1.0  # of wandb's file; a kill loses what came later, the next session puts it back
_BLOCK = 32 * 1024
_CHUNK_HEADER = struct.Struct("<IHB")  # crc, length, type (1 whole, 2 first, 3 middle, 4 last)
_WANDB_MAGIC = b":W&B"
_FILE_HEADER = 7


@dataclass(frozen=True)
class Session:
    """What a backend is opened with."""

    settings: TrackingConfig
    folder: Path
    config: Mapping[str, Any]
    run_ids: Mapping[str, str]

    @property
    def run_name(self) -> str:
        """The configured name, else that of the run folder."""
        return self.settings.run_name or self.folder.resolve().name


class Backend(Protocol):
    """One tracker, fed in the order of metrics.jsonl."""

    name: str
    run_id: str | None  # None where there is no such thing

    def rows_held(self) -> int:
        """How many records it holds from earlier sessions."""

    def write(self, row: int, record: Record) -> None:
        """Take record number `row`."""

    def finish(self) -> None:
        """Write out and close."""


class _Wandb:
    name = "wandb"

    def __init__(self, tracker: WandBTracker, folder: Path, run_id: str, held: int) -> None:
        self._tracker = tracker
        self._folder = folder
        self.run_id: str | None = run_id
        self._held = held

    def rows_held(self) -> int:
        return self._held

    def write(self, row: int, record: Record) -> None:
        import wandb  # noqa: PLC0415 - half a second, only for those who use it

        values: dict[str, Any] = {"step": record["step"], **_scalars(record)}
        for index, (caption, path) in enumerate(_videos(self._folder, record)):
            values[f"sample/{index}"] = wandb.Video(str(path), caption=caption, format="mp4")
        if "report" in record and (page := self._folder / record["report"]).is_file():
            values["evaluation/report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        if "adapter" in record:
            self._artifact(self._folder / record["adapter"], record["step"])
            values["adapter/step"] = record["step"]  # a row of its own: rows are what is counted
        # commit: otherwise the row waits in memory for the next one, and a kill takes it along
        self._tracker.log(values, step=row, commit=True)

    def finish(self) -> None:
        self._tracker.finish()

    def _artifact(self, path: Path, step: int) -> None:
        import wandb  # noqa: PLC0415

        if not path.is_file():
            _say_missing(path)
            return
        artifact = wandb.Artifact(f"adapter-{self.run_id}", type="model", metadata={"step": step})
        artifact.add_file(str(path), policy="immutable", skip_cache=True)  # no second copy on disk: the file never changes
        self._tracker.tracker.log_artifact(artifact, aliases=["latest", f"step-{step}"])


def open_wandb(session: Session) -> Backend:
    """Start or continue a wandb run; never asks for a key. WANDB_MODE outranks `tracking.wandb_mode`, as always in wandb.

    Raises UserError if wandb is missing, refuses, or should be online without a login.
    """
    _require("wandb", "wandb", "pip install wandb")
    import wandb  # noqa: PLC0415

    mode = os.environ.get("WANDB_MODE") or session.settings.wandb_mode
    help_line = "run `wandb login`, set tracking.wandb_mode to offline, or take wandb out of tracking.trackers"
    if mode == "online" and not wandb.login(prompt=False):
        message = f"wandb: not logged in and tracking.wandb_mode is online; {help_line}"
        raise UserError(message)
    # A parent that uses wandb hands its service on, and that one never frees the run id of a child that was killed.
    os.environ.pop("WANDB_SERVICE", None)
    run_id = session.run_ids.get("wandb") or uuid.uuid4().hex[:8]
    held_offline = rows_in_wandb_files(session.folder, run_id)
    tracker = WandBTracker(
        session.settings.project,
        id=run_id,
        name=session.run_name,
        dir=str(session.folder),
        mode=mode,
        resume="allow" if mode == "online" else None,  # offline has nobody to ask: the same id joins the files at sync
        settings=wandb.Settings(silent=True, console="off", x_transaction_log_flush_interval=_FLUSH_SECONDS),
    )
    try:
        tracker.start()
    except wandb.Error as error:
        message = f"wandb: could not start run {run_id} ({error}); {help_line}"
        raise UserError(message) from error
    tracker.store_init_configuration(dict(session.config))
    tracker.tracker.define_metric("step", hidden=True)
    tracker.tracker.define_metric("*", step_metric="step")
    if mode == "offline":
        place = f"offline, send with: wandb sync {session.folder / 'wandb' / f'offline-run-*-{run_id}'}"
    else:
        place = str(tracker.tracker.url)
    console.print(f"wandb: {place}", markup=False)
    held = tracker.tracker.starting_step if mode == "online" else held_offline
    return _Wandb(tracker, session.folder, run_id, held)


def rows_in_wandb_files(folder: Path, run_id: str) -> int:
    """How many rows earlier sessions left in wandb's files of this run under `folder`: highest `_step` + 1."""
    rows = 0
    for path in sorted((folder / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                rows = max(rows, record.history.step.num + 1)
    return rows


def wandb_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a `.wandb` file, as far as they reached the disk.

    The format is LevelDB's log: chunks of at most 32 KiB with a 7-byte header, after a 7-byte file header. wandb 0.31
    ships the message types but no reader any more. Raises UserError if the file is something else.
    """
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415

    data = path.read_bytes()
    if data and not data.startswith(_WANDB_MAGIC):
        message = f"{path}: not a wandb run file; move it away to go on"
        raise UserError(message)
    at, parts = _FILE_HEADER, b""
    while True:
        if _BLOCK - at % _BLOCK < _CHUNK_HEADER.size:
            at += _BLOCK - at % _BLOCK  # too little room for a header: filled with zeros
        if at + _CHUNK_HEADER.size > len(data):
            return
        _, length, kind = _CHUNK_HEADER.unpack_from(data, at)
        at += _CHUNK_HEADER.size
        if kind == 0 or at + length > len(data):
            return  # torn by a kill
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class _Trackio:
    name = "trackio"

    def __init__(self, tracker: TrackioTracker, folder: Path, run_id: str) -> None:
        self._tracker = tracker
        self._folder = folder
        self.run_id: str | None = run_id

    def rows_held(self) -> int:
        from trackio.sqlite_storage import SQLiteStorage  # noqa: PLC0415 - an extra; it has no public count

        return int(SQLiteStorage.get_log_count(self._tracker.run_name, run=self.run_id))

    def write(self, row: int, record: Record) -> None:  # noqa: ARG002 - trackio numbers its rows itself
        import trackio  # noqa: PLC0415

        values: dict[str, Any] = _scalars(record)
        for index, (caption, path) in enumerate(_videos(self._folder, record)):
            values[f"sample/{index}"] = trackio.Video(str(path), caption=caption)
        if "adapter" in record:
            values["adapter/step"] = record["step"]
        self._tracker.log(values, step=record["step"])

    def finish(self) -> None:
        self._tracker.finish()


def open_trackio(session: Session) -> Backend:
    """Start or continue a local trackio run (TRACKIO_DIR, else trackio's own folder), named `<run name>-<4 digits>`.

    Raises UserError if trackio is missing or set up to write to a server: what a server holds cannot be counted.
    """
    _require("trackio", "trackio", install_command("trackio"))
    if found := [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]:
        message = f"trackio: {found[0]} is set, but runs are written locally; unset it and publish later with `trackio sync`"
        raise UserError(message)
    run_id = session.run_ids.get("trackio") or f"{session.run_name}-{uuid.uuid4().hex[:4]}"
    tracker = TrackioTracker(
        session.settings.project,
        name=run_id,
        config=dict(session.config),
        resume="allow",
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    tracker.start()
    return _Trackio(tracker, session.folder, run_id)


class _Tensorboard:
    name = "tensorboard"
    run_id: str | None = None

    def __init__(self, tracker: TensorBoardTracker, folder: Path) -> None:
        self._tracker = tracker
        self._folder = folder

    def rows_held(self) -> int:
        return 0  # opened empty

    def write(self, row: int, record: Record) -> None:  # noqa: ARG002 - TensorBoard has steps, no rows
        values: dict[str, Any] = _scalars(record)
        for index, (caption, path) in enumerate(_videos(self._folder, record)):
            values[f"sample/{index}"] = f"{caption}: {path}"  # its own video format is an animated GIF, made by moviepy
        self._tracker.log(values, step=record["step"])

    def finish(self) -> None:
        self._tracker.finish()


def open_tensorboard(session: Session) -> Backend:
    """Write `tensorboard/` in the run folder anew: its files are a copy of metrics.jsonl, in a format that cannot be cut.

    Raises UserError if TensorBoard is missing.
    """
    _require("tensorboard", "tensorboard", install_command("tensorboard"))
    for events in (session.folder / "tensorboard").glob("events.out.tfevents.*"):
        events.unlink()
    tracker = TensorBoardTracker("tensorboard", logging_dir=str(session.folder))
    tracker.start()
    # Not store_init_configuration: it takes flat values only and opens one more run in a subfolder each time.
    tracker.log({"config": f"```\n{json.dumps(session.config, indent=2)}\n```"}, step=0)
    return _Tensorboard(tracker, session.folder)


def _scalars(record: Record) -> dict[str, Any]:
    """The numbers of a record; what JSON had no number for is NaN again."""
    return {name: float("nan") if value is None else value for name, value in record.items() if name not in META}


def _videos(folder: Path, record: Record) -> Iterator[tuple[str, Path]]:
    """(caption, file) of a record; files that were deleted since are named and left out."""
    for caption, name in record.get("videos", {}).items():
        path = folder / name
        if path.is_file():
            yield caption, path
        else:
            _say_missing(path)


def _say_missing(path: Path) -> None:
    console.print(f"{path}: recorded in metrics.jsonl but gone, not passed on to the tracker", markup=False)


def _require(package: str, tracker: str, command: str) -> None:
    if importlib.util.find_spec(package) is None:
        message = f"tracking.trackers: {tracker} is not installed; {command}, or take {tracker} out of the list"
        raise UserError(message)
