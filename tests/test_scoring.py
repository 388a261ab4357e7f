"""From clips to numbers with made-up networks: what is measured, by whom, and what is said of what could not be."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mochi_lora.config.schema import BackbonesConfig
from mochi_lora.errors import UserError
from mochi_lora.evaluation import scoring
from mochi_lora.evaluation.footage import Clip, Footage
from mochi_lora.evaluation.grid import Cell
from mochi_lora.evaluation.results import Missing
from mochi_lora.inference.shots import Shot
from mochi_lora.inference.video import write_mp4
from mochi_lora.measures.backbones import BUILTIN_IMAGE, BUILTIN_STYLE
from mochi_lora.measures.catalogue import MEASURES
from mochi_lora.measures.encoders import unit_rows
from mochi_lora.measures.features import FeatureCache

PROMPTS = ("a fox in the snow", "a red ball", "a cup on a table")
SUBJECT, BACKGROUND = "quality.subject_consistency", "quality.background_consistency"


@dataclass
class Network:
    """Embeds frames by their mean colour; scores prompt p of the sorted PROMPTS by `favour[p]`."""

    name: str
    comparable: bool = True
    favour: tuple[float, ...] = (1.0, 2.0, 3.0)

    def embed(self, frames):
        return unit_rows(1 + frames.reshape(len(frames), -1, 3).mean(axis=1))

    def scores(self, _frames, _fps, prompts):
        return np.array([dict(zip(PROMPTS, self.favour, strict=True))[prompt] for prompt in prompts], np.float32)

    def truncated(self, _prompts):
        return 0


@pytest.fixture
def networks(monkeypatch):
    """Whatever is asked for is there; built-in ones are not comparable, as in truth."""

    def load(name, _device):
        return Network(name, comparable=not name.startswith("builtin:"))

    for loader in ("load_image_encoder", "load_style", "load_aligner"):
        monkeypatch.setattr(scoring, loader, load)
    return monkeypatch


def cells(folder: Path, frames: dict[str, int], prompts=PROMPTS[:1], seeds=1) -> list[Cell]:
    """Base and adapter, with so many frames each."""
    found = []
    for label, count in frames.items():
        for number, prompt in enumerate(prompts):
            for seed in range(seeds):
                name = f"{label}-{number}-{seed}.mp4"
                colours = np.random.default_rng([number, seed, len(label)]).integers(0, 255, (count, 1, 1, 3))
                write_mp4(folder / name, np.tile(colours, (1, 32, 32, 1)).astype(np.uint8))
                found.append(Cell("trigger", label, float(label == "adapter"), prompt, Shot(name, f"clay, {prompt}", seed)))
    return found


def scored(folder: Path, made: list[Cell], backbones: BackbonesConfig | None = None) -> scoring.Scores:
    footage = Footage(FeatureCache(folder / "features"), frames_per_clip=4)
    references = [Clip.open(folder / made[0].shot.video)]
    return scoring.score(made, folder, references, footage, backbones or BackbonesConfig(), "cpu")


def gaps(found: scoring.Scores) -> dict[str, str]:
    assert len({gap.what for gap in found.missing}) == len(found.missing), "told twice"
    return {gap.what: gap.because for gap in found.missing}


def test_with_the_usual_networks_only_what_a_small_one_measured_is_not_comparable(tmp_path, networks):
    found = scored(tmp_path, cells(tmp_path, {"base": 5, "adapter": 5}))
    assert found.incomparable == {"style.gram"}
    assert "style.gram" in found.rows(cells(tmp_path, {"base": 5}))[0].values


def test_what_any_small_network_measured_is_not_comparable(tmp_path, networks):
    changed = BackbonesConfig(subject=BUILTIN_IMAGE, style=BUILTIN_STYLE)
    found = scored(tmp_path, cells(tmp_path, {"base": 5, "adapter": 5}), changed)
    assert found.incomparable == {SUBJECT, "drift.content", "diversity", "style.descriptor"}


def test_a_full_set_of_clips_lacks_nothing(tmp_path, networks):
    found = scored(tmp_path, cells(tmp_path, {"base": 5, "adapter": 5}, PROMPTS, seeds=2))
    assert gaps(found) == {}
    optional = {"quality.aesthetic", "align.judge", "style.distance"}
    assert {name for row in found.values.values() for name in row} | {"drift.content", "diversity"} == set(MEASURES) - optional


def test_clips_of_two_frames_say_why_they_show_no_motion(tmp_path, networks):
    told = gaps(scored(tmp_path, cells(tmp_path, {"base": 2, "adapter": 2}, PROMPTS, seeds=2)))
    assert set(told) == {"quality.warp_error", "quality.motion_smoothness", "quality.motion_amount"}
    assert set(told.values()) == {"12 of 12 clips have fewer than three frames"}


def test_clips_of_one_frame_say_that_they_are_consistent_with_nothing(tmp_path, networks):
    told = gaps(scored(tmp_path, cells(tmp_path, {"base": 3, "adapter": 1}, PROMPTS, seeds=2)))
    assert told[SUBJECT] == told[BACKGROUND] == "6 of 12 clips have one frame only; the others are measured"
    assert told["quality.warp_error"] == "6 of 12 clips have fewer than three frames; the others are measured"


def test_content_of_clips_of_other_lengths_is_not_compared_and_that_is_said(tmp_path, networks):
    told = gaps(scored(tmp_path, cells(tmp_path, {"base": 4, "adapter": 3}, PROMPTS, seeds=2)))
    assert told == {"drift.content": "6 of 6 clips of the adapter have another number of frames than the base's"}


def test_seeds_of_other_lengths_have_no_diversity_and_that_is_said(tmp_path, networks):
    made = cells(tmp_path, {"base": 4, "adapter": 4}, PROMPTS, seeds=2)
    write_mp4(tmp_path / "adapter-0-1.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    told = gaps(scored(tmp_path, made))
    assert told["diversity"] == (
        "2 of 12 clips have another number of frames than those of the same prompt's other seeds; the others are measured"
    )


def test_one_seed_has_no_diversity_and_that_is_said(tmp_path, networks):
    told = gaps(scored(tmp_path, cells(tmp_path, {"base": 5, "adapter": 5}, PROMPTS)))
    assert told == {"diversity": "6 of 6 clips are of a prompt with one seed, and diversity is between seeds"}


def test_one_prompt_has_no_rank_and_that_is_said_for_each_network(tmp_path, networks):
    told = gaps(scored(tmp_path, cells(tmp_path, {"base": 5, "adapter": 5}, seeds=2)))
    assert set(told) == {f"align.{kind}_{what}" for kind in ("clip", "video") for what in ("first", "rank")}
    assert set(told.values()) == {"4 of 4 clips have no other prompt in their set to be ranked against"}


def test_each_network_ranks_prompts_for_itself(tmp_path, networks):
    tables = {"frames": (0.9, 0.5, 0.1), "film": (0.1, 0.9, 0.9)}
    networks.setattr(scoring, "load_aligner", lambda name, _device: Network(name, favour=tables[name]))
    made = cells(tmp_path, {"base": 5, "adapter": 5}, PROMPTS)
    rows = scored(tmp_path, made, BackbonesConfig(text="frames", video_text="film")).rows(made)

    def told(what: str) -> list[float]:
        return [row.values[f"align.{what}"] for row in rows if row.adapter == "base"]

    assert told("clip_first") == [1, 0, 0]
    assert told("clip_rank") == [1, 2, 3]
    assert told("video_first") == [0, 0.5, 0.5], "a tie is worth the chance of winning it"
    assert told("video_rank") == [3, 1.5, 1.5]


def test_without_a_network_for_text_what_to_set_is_said(tmp_path, networks):
    told = gaps(
        scored(tmp_path, cells(tmp_path, {"base": 5, "adapter": 5}, seeds=2), BackbonesConfig(text=None, video_text=None))
    )
    assert told == {"align.video": "backbones.text and backbones.video_text are null: set one of them"}


def test_one_network_for_subject_and_background_is_one_measure(tmp_path, networks):
    same = BackbonesConfig(subject=BUILTIN_IMAGE, background=BUILTIN_IMAGE)
    found = scored(tmp_path, cells(tmp_path, {"base": 5, "adapter": 5}, PROMPTS, seeds=2), same)
    assert gaps(found) == {
        BACKGROUND: "backbones.background is the network of backbones.subject: on the same frames it gives the same number"
    }
    assert all(SUBJECT in row and BACKGROUND not in row for row in found.values.values())
    assert found.background, "the distance between sets of clips still needs its embeddings"


def test_a_network_that_cannot_be_had_leaves_all_its_measures_missing(tmp_path, networks):
    def absent(name, _device):
        raise UserError(f"{name}: not here")

    networks.setattr(scoring, "load_aligner", absent)
    made = cells(tmp_path, {"base": 5, "adapter": 5}, PROMPTS, seeds=2)
    found = scored(tmp_path, made, BackbonesConfig(text="frames", video_text=None))
    assert found.missing == [Missing(f"align.clip{what}", "frames: not here") for what in ("", "_first", "_rank")]
