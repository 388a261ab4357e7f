"""`mochi-lora evaluate` by two processes of a launch: they share the videos, and tell what one process would tell."""

import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from adapter_files import write_adapter
from gang import together
from synthetic import make_run
from test_evaluate_command import FOX, HILL, few
from tiny_commands import settings
from warm_processes import Place, ended, start

from mochi_lora.commands.evaluation_losses import losses_of
from mochi_lora.config.load import load_config
from mochi_lora.errors import UserError
from mochi_lora.evaluation.footage import Footage
from mochi_lora.evaluation.results import BandLoss
from mochi_lora.evaluation.scoring import Scores, _had
from mochi_lora.measures.features import FeatureCache
from mochi_lora.parallel.mesh import Ranks, share_out
from mochi_lora.tiny.dataset import DrawnSet, draw_clips


def told(folder):
    """Results, rows, report and the videos measured. The grid is left out: it is encoded by as many threads as are free."""
    films = sorted(path.relative_to(folder) for path in folder.glob("*/*.mp4"))
    names = ["quick-results.json", "quick-clips.jsonl", "quick-report.md", *map(str, films)]
    return {name: (folder / name).read_bytes() for name in names}


def losses(ranks: Ranks, path: Path, adapter: Path) -> tuple[BandLoss, ...]:
    return losses_of(load_config(path, ["--engine.parallel", str(ranks.layout)]), adapter, ranks=ranks)


def had(ranks: Ranks, where: int) -> str:
    """What comes of a network that rank `where` cannot have."""

    def load() -> SimpleNamespace:
        if ranks.rank == where:
            raise UserError("no such network")
        return SimpleNamespace(name="net", comparable=True)

    scores, footage = Scores({}), Footage(FeatureCache(Path()), 1, share=partial(share_out, ranks=ranks))
    try:
        found = _had(scores, footage, "style", ("style.descriptor",), load)
    except UserError as error:
        return f"refused: {error}"
    return "missing" if found is None else "had"


def tell_looks() -> None:
    """Say what this process computed itself."""
    remembered = FeatureCache._remembered

    def telling(self, video, key, rows, compute):
        def told():
            print(f"looked: {video} {key}")
            return compute()

        return remembered(self, video, key, rows, told)

    FeatureCache._remembered = telling


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["auto", "context:2", "shard:2"])
def test_held_out_losses_are_those_of_one_process_bit_for_bit(tiny, tmp_path, parallel):
    """However the videos were shared: each clip here is one process's."""
    path = make_run(tmp_path, tiny, clips=5, held_out=3)
    adapter = write_adapter(tmp_path / "style.safetensors", tiny, 1)
    (expected,) = together(1, losses, path, adapter)
    assert isinstance(expected, tuple)
    assert together(2, losses, path, adapter, parallel=parallel) == [expected, expected]


@pytest.mark.slow
def test_the_first_process_says_which_network_is_missing_and_another_may_not_lack_it_alone():
    assert together(2, had, 0) == ["missing", "missing"]
    assert together(2, had, 1) == ["had", "refused: no such network"]


@pytest.mark.slow
def test_two_processes_come_to_the_results_of_one(tiny, tmp_path):
    draw_clips(tmp_path / "chalk", DrawnSet("chalk", 3))
    adapter = write_adapter(tmp_path / "style.safetensors", tiny, 1)
    words = ["evaluate", "--quick", *settings(tiny, tmp_path / "chalk", tmp_path / "cache"), *few(video_text="null")]
    words += ["--run.folder", str(tmp_path / "run"), "--adapter", str(adapter), "--evaluation.trigger", "bbb style"]
    words += ["--evaluation.prompts", f"['{FOX}', '{HILL}']"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    both = [start(words, log, place=Place(rank, 2, port), before=tell_looks) for rank, log in enumerate(logs)]
    assert [ended(process) for process in both] == [0, 0], "".join(log.read_text() for log in logs)
    assert "video 3 of 3" in logs[0].read_text(), "the other half is the other's"
    looks = [{line for line in log.read_text().splitlines() if line.startswith("looked: ")} for log in logs]
    assert min(map(len, looks)) > 0.3 * len(looks[0] | looks[1]), "of the looks, too"
    assert not looks[0] & looks[1]
    found = told(tmp_path / "run" / "evaluation")
    assert len(found) == 3 + 6
    (tmp_path / "run").rename(tmp_path / "both")
    assert ended(start(words, tmp_path / "alone.log")) == 0
    assert told(tmp_path / "run" / "evaluation") == found
