"""The processes of a launch go on from one state, which the first one picks, or they all refuse with what differs."""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from gang import together
from synthetic import make_run, records
from warm_processes import Place, ended, start

from mochi_lora.cli import main
from mochi_lora.commands import train
from mochi_lora.config.load import load_config
from mochi_lora.config.schema import Config
from mochi_lora.errors import UserError
from mochi_lora.parallel.mesh import Layout, Ranks
from mochi_lora.runs import events, resume
from mochi_lora.runs.identity import require_same
from mochi_lora.runs.resume import resumed
from mochi_lora.training import checkpoint
from mochi_lora.training.checkpoint import save_checkpoint

IDENTITY = {"run.seed": 7, "encoded data": "abc"}


def impatient() -> None:
    resume.NOTICE_SECONDS = 0.2


def seen(ranks: Ranks, folders: list[Path], identities: list[dict], hidden: str = "") -> int | str | None:
    """The step that this process goes on from, or what it refuses with. `hidden` cannot be read rightly by the second."""
    impatient()
    hashed = checkpoint.sha256_of_file
    checkpoint.sha256_of_file = lambda path: "rotten" if ranks.rank and path.name == hidden else hashed(path)
    config = Config.model_validate({"run": {"folder": str(folders[ranks.rank])}})
    try:
        found = resumed(config, identities[ranks.rank], ranks)
    except UserError as error:
        return str(error)
    return None if found is None else found.step


def save(folder: Path, *steps: int) -> Path:
    for step in steps:
        save_checkpoint(folder / "checkpoints", step, {"adapter": {"w": torch.full((2,), float(step))}}, keep=9)
    return folder


def refusal(answers: list) -> str:
    """What all ranks say alike."""
    assert isinstance(answers[0], str), answers
    assert answers == [answers[0]] * len(answers)
    assert f"Rank 0 (host {socket.gethostname()})" in answers[0]
    assert f"rank 1 (host {socket.gethostname()}): " in answers[0]
    assert "run.folder and data.cache must lie on a disk that all machines share" in answers[0]
    return answers[0]


def test_all_go_on_from_the_newest_whole_state_of_one_folder_and_nothing_is_left_in_it(tmp_path):
    run = tmp_path / "run"
    assert together(2, seen, [run, run], [IDENTITY, IDENTITY]) == [None, None]
    save(run, 2, 4)
    assert together(2, seen, [run, run], [IDENTITY, IDENTITY]) == [4, 4]
    (run / "checkpoints" / "step-000004" / "adapter.safetensors").write_bytes(b"torn")
    assert together(2, seen, [run, run], [IDENTITY, IDENTITY]) == [2, 2]
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("steps", [((), ()), ((2, 4), (2,)), ((2, 4), ()), ((2,), (2, 4)), ((2,), (2,))])
def test_folders_of_one_name_on_disks_of_their_own_are_refused(tmp_path, steps):
    folders = [save(tmp_path / name / "run", *own) for name, own in zip("ab", steps, strict=True)]
    told = refusal(together(2, seen, folders, [IDENTITY, IDENTITY]))
    assert f"starts in {folders[0]}" in told if not steps[0] else f"goes on from step {steps[0][-1]} in {folders[0]}" in told
    assert f"{folders[1]}: another folder, what rank 0 wrote into its own just now is not in this one" in told
    assert (f"{folders[1]}/checkpoints/step-000004: no such checkpoint" in told) == (steps in [((2, 4), (2,)), ((2, 4), ())])


def test_one_that_reads_another_state_or_a_damaged_one_is_refused(tmp_path):
    run = save(tmp_path / "run", 2)
    told = refusal(together(2, seen, [run, run], [IDENTITY, IDENTITY], "adapter.safetensors"))
    assert "step-000002: damaged checkpoint (adapter.safetensors does not match its checksum)" in told
    assert "another folder" not in told
    other = tmp_path / "other"
    save_checkpoint(other / "checkpoints", 2, {"adapter": {"w": torch.zeros(2)}}, keep=9)
    assert "step-000002: not the state that rank 0 has there" in refusal(together(2, seen, [run, other], [IDENTITY, IDENTITY]))


def test_another_data_set_or_configuration_is_refused_by_its_name(tmp_path):
    run = tmp_path / "run"
    told = refusal(together(3, seen, [run] * 3, [IDENTITY, IDENTITY | {"encoded data": "xyz"}, IDENTITY]))
    assert "encoded data: 'xyz', rank 0 has 'abc'" in told
    assert "rank 2" not in told
    assert "run.seed" not in told


def test_ranks_that_differ_alike_share_a_line():
    sights = [resume._Sight("a", IDENTITY, []), *(resume._Sight("b", IDENTITY, ["x is not there"]) for _ in range(2))]
    assert resume._differences(sights) == ["  rank 1, 2 (host b): x is not there"]


def test_a_run_begun_when_samples_per_step_had_another_name_goes_on():
    now = {"samples per step (batch_size x gradient_accumulation x data ranks)": 2}
    before = "samples per step (batch_size x gradient_accumulation x processes)"
    require_same(Path("run"), {before: 2}, now)
    with pytest.raises(UserError, match=r"x data ranks\): the run has 4, now 2"):
        require_same(Path("run"), {before: 4}, now)


def test_one_process_alone_writes_no_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "write_text", None)
    run = save(tmp_path / "run", 2)
    assert seen(Ranks(Layout(1)), [run], [IDENTITY]) == 2


# --- commands ------------------------------------------------------------------------------------------------------------


def launched(folder: Path, config: Path, words: list[str], second: list[str], before=None) -> tuple[list[int], list[str]]:
    """Statuses and output of two ranks of `train`; `second` are further words of rank 1 alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    for log in logs:
        log.unlink(missing_ok=True)
    own = [["train", "--config", str(config), *words, *more] for more in ([], second)]
    ranks = [start(own[rank], logs[rank], place=Place(rank, 2, port), before=before) for rank in range(2)]
    statuses = [ended(rank) for rank in ranks]
    return statuses, [" ".join(log.read_text().split()) for log in logs]


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_refuse_within_seconds_and_touch_nothing(tiny, tmp_path):
    path = make_run(tmp_path / "data", tiny)
    run, copy = path.parent / "run", tmp_path / "copy" / "run"
    assert main(["train", "--config", str(path), "--train.batch_size", "2", "--train.steps", "2"]) == 0
    shutil.copytree(run, copy)
    assert main(["train", "--config", str(path), "--train.batch_size", "2", "--train.steps", "4"]) == 0
    before, begun = state_of(run), time.monotonic()
    for at in (copy, tmp_path / "none" / "run"):
        statuses, told = launched(tmp_path, path, [], ["--run.folder", str(at)], impatient)
        assert statuses == [1, 1], told
        for text in told:
            assert f"goes on from step 4 in {run}" in text
            assert f"{at}: another folder" in text
            assert "must lie on a disk that all machines share" in text
            assert "continuing at" not in text
    assert time.monotonic() - begun < 90
    assert state_of(run) == before


def far_sighted() -> None:
    """The second rank looks at its disk and finds that videos are due; the first one, and the disk, say otherwise."""
    if os.environ["RANK"] == "1":
        train.videos_missing = events.videos_missing = lambda *_: True


@pytest.mark.slow
def test_the_main_process_alone_decides_what_is_still_due(tiny, tmp_path):
    path = make_run(tmp_path / "data", tiny)
    words = ["--train.sample_every", "2", "--train.peer_timeout_minutes", "0.5"]
    assert main(["train", "--config", str(path), *words, "--train.batch_size", "2", "--train.steps", "2"]) == 0
    for told_first in ("continuing at step 2", "finished at step 3"):
        statuses, told = launched(tmp_path, path, [*words, "--train.steps", "3"], [], far_sighted)
        assert statuses == [0, 0], told
        assert told_first in told[0]
    config = load_config(path, [])
    assert [line["step"] for line in records(config.run.folder, "sample")] == [0, 2, 3]
