"""`mochi-lora evaluate` by two processes of a launch: they share the videos, and tell what one process would tell."""

import socket

import pytest
from adapter_files import write_adapter
from test_evaluate_command import FOX, HILL, few
from tiny_commands import settings
from warm_processes import Place, ended, start

from mochi_lora.tiny.dataset import DrawnSet, draw_clips


def told(folder):
    """Results, rows, report and the videos measured. The grid is left out: it is encoded by as many threads as are free."""
    films = sorted(path.relative_to(folder) for path in folder.glob("*/*.mp4"))
    names = ["quick-results.json", "quick-clips.jsonl", "quick-report.md", *map(str, films)]
    return {name: (folder / name).read_bytes() for name in names}


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
    both = [start(words, log, place=Place(rank, 2, port)) for rank, log in enumerate(logs)]
    assert [ended(process) for process in both] == [0, 0], "".join(log.read_text() for log in logs)
    assert "video 3 of 3" in logs[0].read_text(), "the other half is the other's"
    found = told(tmp_path / "run" / "evaluation")
    assert len(found) == 3 + 6
    (tmp_path / "run").rename(tmp_path / "both")
    assert ended(start(words, tmp_path / "alone.log")) == 0
    assert told(tmp_path / "run" / "evaluation") == found
