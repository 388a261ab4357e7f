"""A real film: its shots against a list of cuts made by eye, and what the default limits keep of it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_captioner import write_captioner
from tiny_commands import TINY_ROAD, index_of
from trailer import trailer

from mochi_lora.cli import main
from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.shots import find_borders
from mochi_lora.curation.survey import survey_source
from mochi_lora.data.probe import probe

BY_EYE = json.loads((Path(__file__).parent / "golden" / "big_buck_bunny_trailer.json").read_text(encoding="utf-8"))
FPS = 24
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder of the tables that split and filter write with the default settings."""
    folder = tmp_path_factory.mktemp("film")
    (folder / "film.yaml").write_text(f"prepare: {{footage: {trailer()}, folder: {folder / 'prepared'}}}\n")
    for step in ("split", "filter"):
        assert main(["prepare", "--only", step, "--config", str(folder / "film.yaml")]) == 0
    return folder / "prepared"


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny):
    """What is typed after `prepare`: one clip a shot of the film, a captioner that always says the same, a tiny base."""
    folder = tmp_path_factory.mktemp("road")
    model = write_captioner(folder / "captioner", "A white rabbit leaves its burrow under a tree.")
    return [
        *("--config", str(TINY_ROAD), "--model.base", str(tiny), "--prepare.footage", str(trailer())),
        *("--prepare.folder", str(folder / "pre pared"), "--caption.model", str(model), "--caption.longest_side", "64"),
        *(
            "--split.mode",
            "head",
            "--split.frames",
            "13",
            "--data.buckets",
            "[13x32x48]",
            "--data.cache",
            str(folder / "cache"),
        ),
        *("--run.folder", str(folder / "run"), "--train.steps", "2", "--train.warmup_steps", "1", "--train.sample_every", "0"),
        *("--train.validate_every", "0", "--sample.prompts", "[a white rabbit]", "--tracking.trackers", "[]"),
    ]


def test_the_film_becomes_an_adapter_by_the_commands_that_are_printed(words, capsys):
    command, ran = ["prepare", *words], []
    while command[0] != "sample":
        ran.append(command[0])
        assert main(command) == 0
        (line,) = re.findall(r"^next     mochi-lora (.+?)(?:   .*)?$", capsys.readouterr().out, re.MULTILINE)
        command = shlex.split(line)
    assert ran == ["prepare", "encode", "train"]
    run = Path(words[words.index("--run.folder") + 1])
    assert list(run.rglob("*.safetensors"))


def test_one_command_makes_a_data_set_of_the_film(words, capsys):
    """What the test before has surveyed and captioned is not done again; only the cache is another."""
    cache = Path(words[words.index("--prepare.folder") + 1]).parent / "other cache"
    assert main(["prepare", "--encode", *words, "--data.cache", str(cache)]) == 0
    assert re.search(r"^next     mochi-lora train ", capsys.readouterr().out, re.MULTILINE)
    assert len(index_of(cache)["entries"]) >= 7
    assert {entry["caption"] for entry in index_of(cache)["entries"]} == {"A white rabbit leaves its burrow under a tree."}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def frames_of(row: dict) -> range:
    return range(round(row["start"] * FPS), round(row["end"] * FPS))


def test_the_film_splits_into_its_shots():
    """Precision and recall of 1: each border is one of those seen, and each of those is found; the film begins in a fade."""
    survey = survey_source(probe(trailer()), SplitConfig(), lambda frames: None)
    found = [border.at for border in find_borders(survey, SplitConfig().black) if border.first > 0]
    assert len(found) == len(BY_EYE["cuts"])
    missed = [(cut, at) for cut, at in zip(BY_EYE["cuts"], found, strict=True) if abs(cut["frame"] - at) > cut["tolerance"]]
    assert missed == []


def test_no_clip_straddles_a_cut_or_shows_a_fade(prepared):
    clips = rows(prepared / "split.jsonl")
    assert len(clips) > 20
    hard = [cut["frame"] for cut in BY_EYE["cuts"] if cut["what"] == "cut"]
    for clip in clips:
        frames = frames_of(clip)
        assert not [cut for cut in hard if frames[0] < cut <= frames[-1]], clip
        assert not [fade for fade in BY_EYE["fading"] if frames[0] <= fade[1] and fade[0] <= frames[-1]], clip


def test_the_title_is_filtered_and_every_shot_long_enough_is_kept(prepared):
    refused, kept = rows(prepared / "refused.jsonl"), rows(prepared / "clips.jsonl")
    assert {row["refused"].split(":")[0] for row in refused} == {"too dark"}
    assert all(frames_of(row)[0] >= BY_EYE["title_from"] for row in refused)
    assert all(frames_of(row)[-1] < BY_EYE["title_from"] for row in kept)
    # Ten shots before the title; what its fades leave of the last one is shorter than a clip.
    assert {row["shot"] for row in kept} == set(range(9))
