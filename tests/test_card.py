"""What can be published of a run: model card, adapter, ComfyUI's copy, videos, and nothing that names the machine."""

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml
from diffusers import MochiPipeline
from low_rank import trained
from markdown_it import MarkdownIt
from report_example import VARIANTS, write_files
from safetensors.torch import load_file
from synthetic import make_run

from mochi_lora.cli import main
from mochi_lora.commands import card, train
from mochi_lora.commands.card_facts import PUBLIC_SETTINGS
from mochi_lora.config.load import load_config
from mochi_lora.config.schema import Config
from mochi_lora.errors import UserError
from mochi_lora.evaluation.results import Evaluation, Pair
from mochi_lora.files import sha256_of_file
from mochi_lora.inference.video import video_name
from mochi_lora.interop.adapter_formats import read_stored, stored_factors
from mochi_lora.interop.factors import difference, factors_of
from mochi_lora.measures.backbones import BUILTIN_IMAGE, BUILTIN_STYLE
from mochi_lora.model.adapter import Adapter
from mochi_lora.model.adapter_file import load_adapter, read_provenance, save_adapter
from mochi_lora.report.card import REPOSITORY, is_as_written, with_repository
from mochi_lora.report.results_file import write_results
from mochi_lora.runs.comfyui_copy import copy_path, refuse_unholdable
from mochi_lora.runs.folder import evaluation_folder, final_adapter, sheet_path

NASTY = "a 'fox'\n```\n\"quoted\" \\ | `ticks` <script>alert(1)</script>"
SETTINGS = {
    "train": {"steps": 2, "warmup_steps": 0, "comfyui_copy": True, "validate_every": 1},
    "evaluation": {"trigger": "bbb style"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny) -> Path:
    """The configuration of a run of two steps that ended a moment ago. Tests read it, or move it elsewhere."""
    folder = tmp_path_factory.mktemp("private-place")
    path = make_run(folder, tiny, train=SETTINGS["train"])
    content = yaml.safe_load(path.read_text()) | {"evaluation": SETTINGS["evaluation"]}
    path.write_text(yaml.safe_dump(content))
    assert main(["train", "--config", str(path)]) == 0
    return path


@pytest.fixture
def moved(finished, tmp_path) -> Config:
    """The same run with nothing but its final adapter, in a folder of the test's own."""
    config = load_config(finished, [])
    folder = tmp_path / "clay"
    folder.mkdir()
    shutil.copy(final_adapter(config), folder)
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": folder})})


def parts(folder: Path) -> tuple[dict, str]:
    """(front matter, the rest) of the card in `folder`."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def published(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def evaluated(config: Config, evaluation: Evaluation, adapter: Path) -> None:
    """Leave behind what `mochi-lora evaluate` would, made with the file `adapter`."""
    folder = evaluation_folder(config)
    folder.mkdir(parents=True)
    write_files(folder, evaluation)
    write_results(folder, evaluation)
    for pair in evaluation.pairs:
        about = {"adapters": [{"path": str(adapter), "sha256": sha256_of_file(adapter)}]}
        (folder / pair.adapter_video).with_suffix(".json").write_text(json.dumps(about))


def film(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not looked into")
    return path


# The copy for ComfyUI


def test_training_leaves_every_adapter_in_comfyuis_layout_as_well(finished):
    run = load_config(finished, []).run.folder
    adapters = [run / "adapter.safetensors", *(run / "adapters").glob("*.safetensors")]
    assert {path.stem for path in adapters} == {"adapter", "best", "step-000002"}
    for path in adapters:
        copied = read_stored(copy_path(path))
        assert copied.format == "comfyui"
        assert copied.provenance["step"] == read_provenance(path)["step"]
        assert difference(factors_of(load_adapter(path)), stored_factors(copied)).worst[1] < 1e-6
    names = load_file(copy_path(adapters[0]))
    assert all(re.fullmatch(r"diffusion_model\.blocks\.\d\.attn\.\w+\.lora_[AB]\.weight", name) for name in names)


def test_a_copy_that_cannot_be_held_is_refused_before_the_base_is_loaded(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_planned", lambda *_, **__: pytest.fail("minutes lost"))
    words = ["train", "--config", str(finished), "--run.folder", str(tmp_path / "run"), "--adapter.dora", "true"]
    assert main(words) == 1
    assert "adapter.dora learns magnitudes" in " ".join(capsys.readouterr().err.split())


def test_adapted_linears_that_the_layout_lacks_are_refused_before_the_first_step(finished):
    adapter = load_adapter(final_adapter(load_config(finished, [])))
    refuse_unholdable(adapter)
    other = {name.replace("transformer_blocks.0", "time_embed"): tensor for name, tensor in adapter.tensors.items()}
    with pytest.raises(UserError, match=r"train\.comfyui_copy: [\s\S]*time_embed"):
        refuse_unholdable(Adapter(other, adapter.config, "the adapter in training"))


# The folder


def test_a_finished_training_leaves_a_folder_that_can_be_published(finished):
    config = load_config(finished, [])
    folder = config.run.folder / "publish"
    assert published(folder) == {"README.md", "pytorch_lora_weights.safetensors", "comfyui/run.safetensors"}
    front, text = parts(folder)
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-video"
    assert {"lora", "text-to-video", "template:sd-lora"} <= set(front["tags"])
    assert front["instance_prompt"] == "bbb style"
    assert front["license"] == "unknown"
    assert "base_model" not in front, "a local folder is no model of the hub"
    assert "for 2 steps" in text
    assert "6 clips of 6 source files, 1.2 s of film; 2 more clips held out." in text
    assert "6 different captions of 2 to 2 words" in text
    assert "| 7x32x48 | 4 |\n| 7x32x64 | 2 |" in text
    assert "| adapter.rank | `4` |" in text
    assert "It was not evaluated against its base." in text


def test_nothing_published_names_the_machine_or_the_clips(finished):
    config = load_config(finished, [])
    folder = config.run.folder / "publish"
    secrets = [str(finished.parent), "private-place", "clip-0", "caption 1", Path(config.model.base).name + "/"]
    header = json.dumps(read_provenance(final_adapter(config)))
    assert any(secret in header for secret in secrets), "else this test cannot fail"
    for path in (folder / name for name in published(folder)):
        content = path.read_bytes()
        assert [secret for secret in secrets if secret.encode() in content] == [], path.name


def test_no_published_setting_can_hold_a_path():
    for section, names in PUBLIC_SETTINGS.items():
        fields = Config.model_fields[section].annotation.model_fields
        kinds = {name: field.annotation for name, field in fields.items() if names is None or name in names}
        assert names is None or names == set(kinds), f"{section}: a setting that is no longer there"
        holding = [name for name, kind in kinds.items() if Path in (kind, *get_args(kind))]
        assert holding == []


def test_stock_diffusers_finds_the_weights_and_they_are_the_adapters(finished):
    config = load_config(finished, [])
    found, metadata = MochiPipeline.lora_state_dict(str(config.run.folder / "publish"), return_lora_metadata=True)
    expected = load_file(final_adapter(config))
    assert found.keys() == expected.keys()
    assert all((found[name] == tensor).all() for name, tensor in expected.items())
    assert metadata["transformer.lora_alpha"] == 8


def test_a_training_that_is_finished_already_gets_the_card_it_lacks(finished, tmp_path, capsys):
    folder = tmp_path / "again"
    shutil.copytree(load_config(finished, []).run.folder, folder)
    shutil.rmtree(folder / "publish")
    assert main(["train", "--config", str(finished), "--run.folder", str(folder)]) == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert (folder / "publish" / "README.md").is_file()


def test_a_card_that_was_cut_off_half_way_is_not_taken_for_a_whole_one(moved, monkeypatch):
    folder = card.run(moved)
    save_adapter(final_adapter(moved), load_adapter(final_adapter(moved)), read_provenance(final_adapter(moved)) | {"step": 9})
    with monkeypatch.context() as patch:
        patch.setattr(card, "write_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            card.bring_up_to_date(moved)
    assert not (folder / "README.md").exists(), "the old one would speak of the new adapter"
    card.bring_up_to_date(moved)
    assert "for 9 steps" in parts(folder)[1]


def test_the_command_takes_another_adapter_folder_and_licence(finished, tmp_path):
    other = load_config(finished, []).run.folder / "adapters" / "best.safetensors"
    words = ["--adapter", str(other), "--output", str(tmp_path / "out"), "--license", "cc-by-4.0"]
    assert main(["card", "--config", str(finished), *words]) == 0
    front, text = parts(tmp_path / "out")
    assert front["license"] == "cc-by-4.0"
    assert "# best\n" in text
    assert "This adapter: `cc-by-4.0`." in text


def test_a_card_changed_by_hand_is_not_replaced_and_training_still_succeeds(finished, moved, tmp_path, capsys):
    folder = card.run(moved)
    assert card.run(moved) == folder, "an unchanged one is written anew"
    (folder / "README.md").write_text((folder / "README.md").read_text() + "Mine.\n")
    before = (folder / "README.md").read_bytes()
    with pytest.raises(UserError, match=r"README\.md: was changed by hand.*--output"):
        card.run(moved)
    save_adapter(final_adapter(moved), load_adapter(final_adapter(moved)), read_provenance(final_adapter(moved)) | {"step": 9})
    train._hand_over(moved, None)
    assert "no model card was written" in " ".join(capsys.readouterr().out.split())
    assert (folder / "README.md").read_bytes() == before


@pytest.mark.parametrize("name", ["notes.txt", "clips/a.mp4", "videos/a.mov", "comfyui/a.ckpt", ".env"])
def test_a_folder_with_anything_else_in_it_is_refused_by_name(moved, tmp_path, name):
    film(tmp_path / "out" / name)
    with pytest.raises(UserError, match=re.escape(name)):
        card.run(moved, output=tmp_path / "out")


def test_a_link_out_of_the_folder_is_refused(moved, tmp_path):
    secret = film(tmp_path / "secret.mp4")
    (tmp_path / "out" / "videos").mkdir(parents=True)
    (tmp_path / "out" / "videos" / "a.mp4").symlink_to(secret)
    with pytest.raises(UserError, match=r"videos/a\.mp4"):
        card.run(moved, output=tmp_path / "out")


def test_adapters_without_a_history_get_no_card(moved):
    save_adapter(final_adapter(moved), load_adapter(final_adapter(moved)), {"step": 3})
    with pytest.raises(UserError, match="says nothing of the settings it was trained with"):
        card.run(moved)


def test_an_adapter_of_the_hubs_base_names_it_and_its_licence(moved):
    history = read_provenance(final_adapter(moved)) | {"base": "genmo/mochi-1-preview"}
    del history["data"]
    save_adapter(final_adapter(moved), load_adapter(final_adapter(moved)), history)
    front, text = parts(card.run(moved))
    assert front["base_model"] == "genmo/mochi-1-preview"
    assert front["base_model_relation"] == "adapter"
    assert "mochi-1-preview" in front["tags"]
    assert "is under the Apache License 2.0" in text
    assert "Not recorded: the adapter was written by a version" in text


def test_an_adapter_comfyui_cannot_hold_says_so(moved, load_tiny):
    save_adapter(final_adapter(moved), trained(load_tiny(), dora=True), read_provenance(final_adapter(moved)))
    folder = card.run(moved)
    assert published(folder) == {"README.md", "pytorch_lora_weights.safetensors"}
    assert "There is no file for ComfyUI" in parts(folder)[1]


# After an evaluation


def test_an_evaluation_goes_into_the_card_that_is_there_and_its_licence_stays(moved):
    folder = card.run(moved, licence="cc-by-4.0")
    assert "It was not evaluated against its base." in parts(folder)[1]
    evaluated(moved, VARIANTS["worked"](), final_adapter(moved))
    card.retell(moved, final_adapter(moved))
    front, text = parts(folder)
    assert "**Verdict: positive.**" in text
    assert front["license"] == "cc-by-4.0"


@pytest.mark.slow
def test_evaluate_brings_the_runs_card_up_to_date_unless_it_was_changed_by_hand(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(load_config(finished, []).run.folder, folder)
    networks = {
        "subject": BUILTIN_IMAGE,
        "background": BUILTIN_IMAGE,
        "style": BUILTIN_STYLE,
        "text": "null",
        "video_text": "null",
    }
    settings = {f"backbones.{role}": name for role, name in networks.items()}
    settings |= {"run.folder": str(folder), "evaluation.prompts": "['bbb style, a fox', 'bbb style, a ball']"}
    call = [
        "evaluate",
        "--quick",
        "--config",
        str(finished),
        *(word for key in settings for word in (f"--{key}", settings[key])),
    ]
    assert main([*call, "--output", str(tmp_path / "elsewhere")]) == 0
    assert "It was not evaluated against its base." in parts(folder / "publish")[1]
    assert main(call) == 0
    text = parts(folder / "publish")[1]
    assert "**Verdict: indicative.**" in text
    assert "| bbb style, a ball | 0 | [video](videos/base-2.mp4) | [video](videos/adapter-2.mp4) |" in text
    (folder / "publish" / "README.md").write_text("My own words.\n")
    capsys.readouterr()
    assert main(call) == 0
    assert "the model card was left as it is: " in " ".join(capsys.readouterr().out.split())
    assert (folder / "publish" / "README.md").read_text() == "My own words.\n"


def test_a_card_changed_by_hand_stays_as_it_is_after_an_evaluation(moved):
    path = card.run(moved) / "README.md"
    path.write_text("My own words.\n")
    evaluated(moved, VARIANTS["worked"](), final_adapter(moved))
    with pytest.raises(UserError, match="was changed by hand"):
        card.retell(moved, final_adapter(moved))
    assert path.read_text() == "My own words.\n"


def test_no_evaluation_makes_a_card_or_changes_one_that_is_about_another_adapter(finished, moved):
    evaluated(moved, VARIANTS["worked"](), final_adapter(moved))
    card.retell(moved, final_adapter(moved))
    assert not (moved.run.folder / "publish").exists()
    best = load_config(finished, []).run.folder / "adapters" / "best.safetensors"
    written = (card.run(moved, adapter=best) / "README.md").read_bytes()
    card.retell(moved, final_adapter(moved))
    assert (moved.run.folder / "publish" / "README.md").read_bytes() == written
    written = (card.run(moved) / "README.md").read_bytes()
    card.retell(moved, best)
    assert (moved.run.folder / "publish" / "README.md").read_bytes() == written


# What it shows


def test_the_evaluation_of_this_very_file_is_told_and_its_pairs_are_shown(moved):
    evaluated(moved, VARIANTS["worked"](), final_adapter(moved))
    folder = card.run(moved)
    front, text = parts(folder)
    evaluation = VARIANTS["worked"]()
    asked = [pair for pair in evaluation.pairs if pair.prompt_set == "trigger"][:6]
    assert "**Verdict: positive.**" in text
    assert all(reason[:20] in text for reason in evaluation.verdict.reasons)
    assert [row["text"] for row in front["widget"]] == [pair.prompt for pair in asked]
    addresses = [row["output"]["url"] for row in front["widget"]]
    assert addresses == [f"videos/adapter-{number}.mp4" for number in range(1, len(asked) + 1)]
    for number, pair in enumerate(asked, 1):
        for side in ("base", "adapter"):
            source = evaluation_folder(moved) / getattr(pair, f"{side}_video")
            assert (folder / "videos" / f"{side}-{number}.mp4").read_bytes() == source.read_bytes()
    assert "runs/" not in text


def test_a_quick_look_is_told_as_one(moved):
    evaluation = replace(VARIANTS["quick"](), pairs=(Pair("trigger", "bbb style, a fox", 0, "base/a.mp4", "adapter/a.mp4"),))
    evaluated(moved, evaluation, final_adapter(moved))
    text = parts(card.run(moved))[1]
    assert "**Verdict: indicative.**" in text
    assert "nothing was tested" in text
    assert "Not comparable with other people's numbers: Subject consistency, Frame-text alignment, Style similarity." in text


def test_the_evaluation_of_another_file_is_not_told(moved, tmp_path):
    evaluated(moved, VARIANTS["worked"](), film(tmp_path / "other.safetensors"))
    front, text = parts(card.run(moved))
    assert "It was not evaluated against its base." in text
    assert "widget" not in front


def test_without_an_evaluation_the_runs_own_samples_are_shown_and_stale_videos_go(moved):
    (prompt,), (seed,) = moved.sample.prompts, moved.sample.seeds
    name = video_name(0, prompt, seed)
    now, before = (film(sheet_path(moved, step).parent / name) for step in (2, 0))
    now.write_bytes(b"after")
    film(moved.run.folder / "publish" / "videos" / "adapter-7.mp4")
    folder = card.run(moved)
    assert (folder / "videos" / "adapter-1.mp4").read_bytes() == b"after"
    assert (folder / "videos" / "base-1.mp4").read_bytes() == before.read_bytes()
    assert not (folder / "videos" / "adapter-7.mp4").exists()
    assert f"| {prompt} | {seed} | [video](videos/base-1.mp4) | [video](videos/adapter-1.mp4) |" in parts(folder)[1]


def test_a_prompt_cannot_break_the_card(moved):
    evaluation = replace(VARIANTS["worked"](), pairs=(Pair("trigger", NASTY, 0, "base/a.mp4", "adapter/a.mp4"),))
    evaluated(moved, evaluation, final_adapter(moved))
    front, text = parts(card.run(moved))
    assert front["widget"][0]["text"] == NASTY
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    (code,) = [token.content for token in tokens if token.type == "fence"]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert NASTY in strings
    assert REPOSITORY in strings
    assert "<script>" not in "".join(token.content for token in tokens if token.type.startswith("html"))
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[-1] == "Base model and licence"


def test_the_repositorys_name_goes_in_without_breaking_the_seal(moved):
    text = (card.run(moved) / "README.md").read_text(encoding="utf-8")
    assert is_as_written(text)
    named = with_repository(text, "me/clay")
    assert 'pipe.load_lora_weights("me/clay"' in named
    assert is_as_written(named)
    assert not is_as_written(with_repository(text + "Mine.", "me/clay"))
