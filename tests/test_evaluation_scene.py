"""What an evaluation is about, and what a person is told before hours of sampling."""

import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_commands import TINY_ROAD

from mochi_lora.commands import evaluation_scene
from mochi_lora.commands.evaluation_scene import check_networks, set_scene
from mochi_lora.config.load import load_config
from mochi_lora.config.requests import EvaluationRequest
from mochi_lora.data.cache import EncoderIdentity
from mochi_lora.data.index import Index, IndexEntry, write_index
from mochi_lora.errors import UserError
from mochi_lora.files import sha256_of_file
from mochi_lora.tiny.dataset import DrawnSet, draw_clips

BUILTIN = {"subject": "builtin:efficientnet-lite0", "background": "builtin:efficientnet-lite0"} | {
    "style": "builtin:efficientnet-lite0-gram",
    "text": "null",
    "video_text": "builtin:conse",
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two folders of clips with the same file names."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_clips(folder / "chalk", DrawnSet("chalk", 5))
    draw_clips(folder / "plain", DrawnSet("base", 3, seed=1))
    return folder


@pytest.fixture
def configured(drawn, tmp_path):
    """A configuration of both folders, with a file where the adapter is looked for."""
    adapter = tmp_path / "run" / "adapter.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"")

    def config(*more, prompts=8, networks=BUILTIN):
        mix = [{"clips": str(drawn / name)} for name in ("chalk", "plain")]
        asked = [f"chalk style, {number} red balls on a hill" for number in range(prompts)]
        words = [
            "--data.clips",
            "clips",
            "--data.mix",
            json.dumps(mix),
            "--data.cache",
            str(tmp_path / "cache"),
            "--run.folder",
            str(tmp_path / "run"),
        ]
        words += ["--evaluation.trigger", "chalk style", "--evaluation.prompts", json.dumps(asked)]
        words += [word for key, name in networks.items() for word in (f"--backbones.{key}", name)]
        return load_config(TINY_ROAD, [*words, *more])

    return config


def encoded(config, held_out):
    """The index that `encode` would leave, with these clips held out."""
    here = [path for part in config.data.mix for path in sorted(part.clips.glob("*.mp4"))]
    entries = [
        IndexEntry(str(path), sha256_of_file(path), "25x64x96", "", "", "", "validation" if path in held_out else "train")
        for path in here
    ]
    by = EncoderIdentity("0", "fp32")
    write_index(config.data, Index("tiny", None, by, by, (0.0,), (1.0,), 1.0, tuple(entries)))


def scene_of(config, **request):
    return set_scene(config, EvaluationRequest(**request))


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_held_out_clips_are_neither_training_clips_nor_their_captions_training_captions(configured, drawn):
    config = configured()
    held_out = {drawn / "chalk" / "001.mp4", drawn / "plain" / "002.mp4"}
    encoded(config, held_out)
    scene = scene_of(config)
    assert len(scene.training.clips) == 6
    assert held_out.isdisjoint(clip.path for clip in [*scene.training.clips, *scene.references.clips])
    captions = {(path.with_suffix(".txt")).read_text(encoding="utf-8").strip() for path in held_out}
    assert captions.isdisjoint(cell.shot.prompt for cell in scene.on_captions)
    assert scene.training.told == "6, 2 held out of training are left out"
    assert scene.references.told == "4"


def test_where_nothing_is_encoded_all_clips_count(configured):
    assert scene_of(configured()).training.told == "8"


def test_clips_of_two_folders_have_different_names(configured):
    names = [clip.name for clip in scene_of(configured()).training.clips]
    assert {"chalk/000.mp4", "plain/000.mp4"} <= set(names)
    assert len(set(names)) == 8


def test_more_clips_than_are_compared_are_told(configured, monkeypatch):
    monkeypatch.setattr(evaluation_scene, "_MOST_TRAINING", 5)
    monkeypatch.setattr(evaluation_scene, "_MOST_REFERENCES", 2)
    scene = scene_of(configured())
    assert (len(scene.training.clips), scene.training.told) == (5, "5 of 8, evenly spaced")
    assert (len(scene.references.clips), scene.references.told) == (2, "2 of 5, evenly spaced")


def test_clips_that_cannot_be_read_are_counted_and_named(configured, drawn, tmp_path, capsys):
    clips = shutil.copytree(drawn / "chalk", tmp_path / "broken")
    (clips / "001.txt").unlink()
    (clips / "002.mp4").write_bytes(b"no video")
    scene = scene_of(configured("--data.mix", "[]", "--data.clips", str(clips)))
    assert scene.training.told == "3, 2 could not be read"
    told = said(capsys)
    assert "001.mp4: no caption" in told
    assert "002.mp4" in told


@pytest.mark.parametrize(
    ("prompts", "quick", "told"), [(2, False, True), (6, False, True), (7, False, False), (2, True, False)]
)
def test_too_few_prompts_for_a_verdict_are_told_beforehand(configured, capsys, prompts, quick, told):
    scene_of(configured(prompts=prompts), quick=quick)
    assert (f"{prompts} trigger prompts are too few to test: below 7" in said(capsys)) is told


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"style": "builtin:vgg"}, r"backbones\.style: builtin:vgg: not a backbone for style descriptors"),
        ({"subject": "nowhere/at/all"}, r"backbones\.subject: nowhere/at/all: asked for embedding frames, but it is not there"),
        ({"text": "nobody/no-such-clip"}, r"backbones\.text: nobody/no-such-clip: needed for text alignment"),
        ({"judge": "nobody/no-such-judge"}, r"backbones\.judge: nobody/no-such-judge"),
        ({"aesthetic": "nowhere.safetensors"}, r"nowhere\.safetensors: the aesthetic head cannot be read"),
    ],
)
def test_a_configured_network_that_cannot_be_had_ends_the_call_before_sampling(configured, monkeypatch, changed, expected):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _offline)
    with pytest.raises(UserError, match=expected):
        check_networks(configured(networks=BUILTIN | changed), sampling=True)


def test_a_default_that_the_hub_does_not_give_is_told_and_is_no_error(configured, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _offline)
    check_networks(configured(networks={}), sampling=True)
    told = said(capsys)
    for key, name in {"subject": "facebook/dinov2-base", "style": "yuxi-liu-wired/CSD", "text": "openai/clip"}.items():
        assert f"will not be measured (backbones.{key}): {name}" in told


def test_networks_that_are_here_pass_in_silence(configured, capsys):
    check_networks(configured(), sampling=True)
    assert said(capsys) == ""


def test_clips_made_elsewhere_are_measured_with_what_there_is_but_not_with_a_wrong_head(configured, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _offline)
    check_networks(configured(networks=BUILTIN | {"style": "nobody/no-such-style"}), sampling=False)
    with pytest.raises(UserError, match="aesthetic head cannot be read"):
        check_networks(configured(networks=BUILTIN | {"aesthetic": "nowhere.safetensors"}), sampling=False)


def _offline(repository, **_options):
    raise LocalEntryNotFoundError("no connection")
