"""Trackers: metrics.jsonl is the truth, and every tracker ends up holding each of its records once, kills included."""

import json
import math
import os
import re
import sqlite3
import struct
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from mochi_lora.config.schema import TrackingConfig
from mochi_lora.errors import UserError, install_command
from mochi_lora.training import tracker_backends
from mochi_lora.training.tracker_backends import rows_in_wandb_files, wandb_records
from mochi_lora.training.tracking import HISTORY, Silent, open_trackers

CONFIG = {"train": {"steps": 40}, "adapter": {"rank": 8}}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No account, no key, no home folder, nothing shared between tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _open(folder, *trackers, run_ids=None):
    settings = TrackingConfig(trackers=list(trackers), project="p", wandb_mode="offline")
    return open_trackers(settings, folder, CONFIG, run_ids or {})


def _lines(folder):
    return [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]


def _steps(folder):
    return [(line["kind"], line["step"]) for line in _lines(folder)]


def _child(code, *words):
    """Run `code` in a process of its own, where trackers may be killed and environments differ."""
    head = f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    head += "from test_tracking import _open\nfolder = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parent.parent)


def test_each_call_is_one_line_with_step_time_kind_and_values(tmp_path):
    with _open(tmp_path) as trackers:
        trackers.log(10, {"loss": 0.5, "lr": 1e-4})
        trackers.log(10, {"loss": math.nan}, kind="heldout")
        trackers.log_videos(10, {"a dog": tmp_path / "samples" / "dog.mp4"})
        trackers.log_adapter(10, tmp_path.parent / "elsewhere.safetensors")
    first, second, third, fourth = _lines(tmp_path)
    assert {key: first[key] for key in ("step", "kind", "loss", "lr")} == {"step": 10, "kind": "train", "loss": 0.5, "lr": 1e-4}
    assert first["time"] > 1e9
    assert (second["kind"], second["loss"]) == ("heldout", None)
    assert third["videos"] == {"a dog": "samples/dog.mp4"}, "inside the run folder, paths are relative to it"
    assert fourth["adapter"] == str(tmp_path.parent.resolve() / "elsewhere.safetensors")


def test_steps_replayed_after_a_resume_are_dropped_per_kind(tmp_path):
    with _open(tmp_path) as trackers:
        for step in (10, 20, 30):
            trackers.log(step, {"loss": step})
        trackers.log(20, {"loss": 1}, kind="heldout")
    with _open(tmp_path) as trackers:
        for step in (20, 30, 40):
            trackers.log(step, {"loss": step})
        for step in (20, 30):
            trackers.log(step, {"loss": 1}, kind="heldout")
    assert _steps(tmp_path) == [("train", 10), ("train", 20), ("train", 30), ("heldout", 20), ("train", 40), ("heldout", 30)]


def test_a_line_torn_by_a_kill_is_cut_and_written_again(tmp_path):
    with _open(tmp_path) as trackers:
        trackers.log(10, {"loss": 1})
        trackers.log(20, {"loss": 2})
    path = tmp_path / HISTORY
    path.write_bytes(path.read_bytes()[:-9])
    with _open(tmp_path) as trackers:
        trackers.log(20, {"loss": 2})
        trackers.log(30, {"loss": 3})
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [(10, 1), (20, 2), (30, 3)]


def test_a_damaged_line_inside_is_refused_by_number(tmp_path):
    (tmp_path / HISTORY).write_text('{"step": 1, "kind": "train"}\n{"step":\n{"step": 3, "kind": "train"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not JSON"):
        _open(tmp_path)


def test_a_record_is_on_disk_before_any_tracker_hears_of_it(tmp_path):
    seen = []

    class Spy:
        name, run_id = "spy", None

        def rows_held(self):
            return 0

        def write(self, row, record):
            seen.append((row, _lines(tmp_path)[-1] == record))

        def finish(self):
            seen.append("finished")

    from mochi_lora.training.tracking import Trackers

    with Trackers(tmp_path, [], [Spy()], {}) as trackers:
        trackers.log(1, {"loss": 1})
        trackers.log_videos(1, {"a dog": tmp_path / "dog.mp4"})
    assert seen == [(0, True), (1, True), "finished"]


def test_a_tracker_that_is_ahead_is_continued_behind_its_last_row(tmp_path, capsys):
    rows = []

    class Ahead:
        name, run_id = "ahead", None
        rows_held = staticmethod(lambda: 5)
        write = staticmethod(lambda row, record: rows.append((row, record["step"])))
        finish = staticmethod(lambda: None)

    from mochi_lora.training.tracking import Trackers

    with Trackers(tmp_path, [], [Ahead()], {}) as trackers:
        trackers.log(1, {"loss": 1})
        trackers.log(2, {"loss": 1})
    assert rows == [(5, 1), (6, 2)]
    assert "holds 5 records" in capsys.readouterr().out


def test_a_tracker_switched_off_keeps_its_identity(tmp_path):
    (tmp_path / "tracker_ids.json").write_text('{"wandb": "aaaaaaaa"}')
    with _open(tmp_path) as trackers:
        assert trackers.run_ids == {"wandb": "aaaaaaaa"}


def test_other_processes_are_silent(tmp_path):
    silent = Silent()
    silent.log(1, {"loss": 1})
    silent.log_videos(1, {})
    silent.log_adapter(1, tmp_path)
    silent.finish()
    assert silent.run_ids == {}


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(tracker_backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"{tracker} is not installed; {install_command(tracker)}")):
        _open(tmp_path, tracker)


def test_trackio_pointed_at_a_server_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/board")
    with pytest.raises(UserError, match="TRACKIO_SPACE_ID is set"):
        _open(tmp_path, "trackio")


def test_wandb_online_without_a_login_is_an_error_not_a_question(tmp_path):
    child = _child(
        """
        from mochi_lora.config.schema import TrackingConfig
        from mochi_lora.errors import UserError
        from mochi_lora.training.tracking import open_trackers
        try:
            open_trackers(TrackingConfig(trackers=["wandb"]), folder, {}, {})
        except UserError as error:
            print(error)
        """,
        tmp_path,
    )
    assert child.stdout.startswith("wandb: not logged in"), child.stderr
    assert "`wandb login`" in child.stdout
    assert "tracking.wandb_mode to offline" in child.stdout


# One run in two sessions. The first is killed: what it holds then depends on when wandb last flushed.
_FIRST = """
    import os, signal, time
    from mochi_lora.training import tracker_backends
    tracker_backends._FLUSH_SECONDS = 2.0 if sys.argv[3] == "flushed" else 600.0
    trackers = _open(folder, sys.argv[2])
    (folder / "dog.mp4").write_bytes(b"not really a film")
    (folder / "adapter.safetensors").write_bytes(b"weights")
    for step in (10, 20):
        trackers.log(step, {"loss": step / 10})
    trackers.log(20, {"heldout/loss": 0.25}, kind="heldout")
    trackers.log_videos(20, {"a dog": folder / "dog.mp4"})
    trackers.log_adapter(20, folder / "adapter.safetensors")
    if sys.argv[3] == "flushed":
        while tracker_backends.rows_in_wandb_files(folder, trackers.run_ids["wandb"]) < 3: time.sleep(0.05)
    trackers.log(30, {"loss": 3.0})
    trackers.log(40, {"loss": 4.0})
    print(trackers.run_ids[sys.argv[2]], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
_SECOND = """
    trackers = _open(folder, sys.argv[2], run_ids={sys.argv[2]: sys.argv[3]})
    for step in (30, 40, 50):  # the checkpoint was at step 20
        trackers.log(step, {"loss": step / 10})
    trackers.finish()
"""


@pytest.mark.parametrize("moment", ["flushed", pytest.param("unflushed", marks=pytest.mark.slow)])
def test_wandb_offline_holds_config_and_every_record_once_across_a_kill(tmp_path, moment):
    first = _child(_FIRST, tmp_path, "wandb", moment)
    assert first.returncode == -9, first.stderr
    run_id = first.stdout.split()[-1]
    left = rows_in_wandb_files(tmp_path, run_id)
    assert left in ({"flushed": range(1, 7), "unflushed": [0]}[moment]), "the kill came when there was nothing to lose"
    second = _child(_SECOND, tmp_path, "wandb", run_id)
    assert second.returncode == 0, second.stderr
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2, "both sessions carry the same run id"
    records = [record for path in files for record in wandb_records(path)]
    rows = [_row(record.history) for record in records if record.WhichOneof("record_type") == "history"]
    assert [row["_step"] for row in rows] == list(range(8)), "in order, each once, none missing"
    losses = Counter((row["step"], row["loss"]) for row in rows if "loss" in row)
    assert losses == Counter({(step, step / 10): 1 for step in (10, 20, 30, 40, 50)})
    assert [(row["step"], row["heldout/loss"]) for row in rows if "heldout/loss" in row] == [(20, 0.25)]
    (video,) = [row["sample/0"] for row in rows if "sample/0" in row]
    assert (video["_type"], video["caption"]) == ("video-file", "a dog")
    films = list((tmp_path / "wandb").glob(f"offline-run-*/files/{video['path']}"))
    assert {film.read_bytes() for film in films} == {b"not really a film"}
    config = {item.key: json.loads(item.value_json) for record in records for item in record.run.config.update}
    config |= {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert {key: config[key] for key in CONFIG} == CONFIG
    artifacts = [record for record in records if "adapter.safetensors" in str(record) and "model" in str(record)]
    assert artifacts, "the adapter is stored as an artifact"
    assert _steps(tmp_path)[-3:] == [("train", 30), ("train", 40), ("train", 50)]


@pytest.mark.slow
def test_a_killed_run_comes_back_under_a_parent_that_uses_wandb_itself(tmp_path):
    """A notebook or a sweep agent has a wandb service, which its children inherit and which never frees a killed run's id."""
    parent = _child(
        """
        import os, wandb
        from test_tracking import _FIRST, _SECOND, _child
        wandb.setup()
        assert os.environ["WANDB_SERVICE"]
        first = _child(_FIRST, folder, "wandb", "flushed")
        second = _child(_SECOND, folder, "wandb", first.stdout.split()[-1])
        print(first.returncode, second.returncode, second.stderr)
        """,
        tmp_path,
    )
    assert parent.stdout.split() == ["-9", "0"], parent.stdout + parent.stderr


def _row(history):
    row = {}
    for item in history.item:
        *outer, last = item.nested_key or [item.key]
        place = row
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return row


def _write_wandb_file(path, records):
    """LevelDB's log format, written from its description: the reader's other half."""
    data = b":W&B" + bytes(3)
    for record in records:
        rest, first = record.SerializeToString(), True
        while rest or first:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            data += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
    path.write_bytes(data)


def _history(step, text):
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    record.history.step.num = step
    record.history.item.add(key="text", value_json=json.dumps(text))
    return record


def test_the_wandb_reader_joins_records_that_span_blocks(tmp_path):
    path = tmp_path / "wandb" / "offline-run-1-abc" / "run-abc.wandb"
    path.parent.mkdir(parents=True)
    records = [_history(step, "x" * size) for step, size in enumerate((10, 90_000, 3, *range(32_600, 32_760, 3), 5))]
    _write_wandb_file(path, records)
    assert list(wandb_records(path)) == records
    assert rows_in_wandb_files(tmp_path, "abc") == len(records)
    assert rows_in_wandb_files(tmp_path, "other") == 0


def test_the_wandb_reader_stops_at_a_torn_end_and_refuses_other_files(tmp_path):
    path = tmp_path / "run.wandb"
    records = [_history(step, "x" * 100) for step in range(3)]
    _write_wandb_file(path, records)
    content = path.read_bytes()
    for cut in range(1, 100, 7):
        path.write_bytes(content[:-cut])
        assert list(wandb_records(path)) == records[:2]
    path.write_bytes(b":W&B\0\0\0")  # what a run killed at once leaves
    assert list(wandb_records(path)) == []
    path.write_bytes(b"something else entirely")
    with pytest.raises(UserError, match="not a wandb run file"):
        list(wandb_records(path))


def test_trackio_holds_config_video_and_every_record_once_across_a_kill(tmp_path):
    first = _child(_FIRST, tmp_path, "trackio", "")
    assert first.returncode == -9, first.stderr
    name = first.stdout.split()[-1]
    second = _child(_SECOND, tmp_path, "trackio", name)
    assert second.returncode == 0, second.stderr
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "p.db") as database:
        rows = [
            (step, json.loads(metrics)) for step, metrics in database.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
        configs = [json.loads(row[0]) for row in database.execute("SELECT config FROM configs")]
    assert [(step, row["loss"]) for step, row in rows if "loss" in row] == [(step, step / 10) for step in (10, 20, 30, 40, 50)]
    (video,) = [row["sample/0"] for _, row in rows if "sample/0" in row]
    assert video["caption"] == "a dog"
    assert [key for key in CONFIG if configs[0][key] == CONFIG[key]] == list(CONFIG)


def test_tensorboard_holds_every_record_once_after_a_resume(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with _open(tmp_path, "tensorboard") as trackers:
        for step in (10, 20, 30):
            trackers.log(step, {"loss": step / 10})
    with _open(tmp_path, "tensorboard") as trackers:
        (tmp_path / "dog.mp4").write_bytes(b"film")
        for step in (20, 30, 40):
            trackers.log(step, {"loss": step / 10})
        trackers.log_videos(40, {"a dog": tmp_path / "dog.mp4"})
    events = loader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 6)) for event in events.Scalars("loss")] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    tensors = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert '"rank": 8' in tensors["config/text_summary"]
    assert tensors["sample/0/text_summary"].startswith("a dog: ")


def test_a_tracker_added_later_gets_the_whole_history(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with _open(tmp_path) as trackers:
        trackers.log(10, {"loss": 1.0})
        trackers.log(20, {"loss": math.inf})
        trackers.log_videos(20, {"a dog": tmp_path / "deleted.mp4"})
    with _open(tmp_path, "tensorboard"):
        pass
    events = loader.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert (events[0].step, events[0].value) == (10, 1)
    assert events[1].step == 20
    assert math.isnan(events[1].value)
