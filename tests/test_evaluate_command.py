"""`mochi-lora evaluate`: what comes out, and what a person is told when it cannot."""

import json
import os
import shutil
import signal

import pytest
import torch
from drawn_evaluation import restyled, write_clips
from tiny_commands import TINY_ROAD, settings
from warm_processes import ended, start

from mochi_lora.cli import main
from mochi_lora.config.schema import AdapterConfig
from mochi_lora.model.adapter import attach, current
from mochi_lora.model.adapter_file import save_adapter
from mochi_lora.model.weights import load_transformer
from mochi_lora.runs import videos
from mochi_lora.tiny.dataset import DrawnSet, draw_clips
from mochi_lora.training.tracker_backends import wandb_records

BUILTIN = {
    "subject": "builtin:efficientnet-lite0",
    "background": "builtin:efficientnet-lite0",
    "style": "builtin:efficientnet-lite0-gram",
    "text": "null",
    "video_text": "drawn-world",
}
CHALK = "chalk style"
CONSE = ["--backbones.video_text", "builtin:conse"]
FOX, HILL = "bbb style, a fox in the snow", "bbb style, a red ball on a hill"


def backbones(**changed: str) -> list[str]:
    """Words that choose the networks."""
    return [word for role, name in (BUILTIN | changed).items() for word in (f"--backbones.{role}", name)]


def few(**changed: str) -> list[str]:
    """The same, and everything as cheap as can be."""
    return [*backbones(**changed), "--evaluation.frames_per_clip", "2", "--evaluation.resamples", "200"]


REPORT_FILES = ("report.html", "report.md", "results.json", "clips.jsonl", "before_after.png", "grid.mp4")


def results(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def said(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references") / "chalk"
    draw_clips(folder, DrawnSet("chalk", 5))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Clips of two trigger prompts, base and adapter. Tests read them or copy them first."""
    return write_clips(tmp_path_factory.mktemp("drawn") / "clips", {"trigger": (2, restyled("chalk"))})


@pytest.fixture
def clips(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "clips")


@pytest.fixture
def judge(tmp_path, references):
    """Runs evaluate on clips made elsewhere; returns the exit code."""

    def run(clips, *words, trigger=CHALK, data=references):
        where = [
            "--config",
            str(TINY_ROAD),
            "--from-videos",
            str(clips),
            "--data.clips",
            str(data),
            "--run.folder",
            str(tmp_path / "run"),
        ]
        return main(["evaluate", *where, "--evaluation.trigger", trigger, *(words or few())])

    return run


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    transformer = load_transformer(tiny / "transformer", device=torch.device("cpu"), precision="fp32").transformer
    draw = torch.Generator().manual_seed(1)
    for key, parameter in attach(transformer, AdapterConfig(rank=4, alpha=8), 1).items():
        if ".lora_B." in key:
            parameter.data.normal_(0, 0.5, generator=draw)
    path = tmp_path_factory.mktemp("adapter") / "style.safetensors"
    save_adapter(path, current(transformer), {"step": 3})
    return path


@pytest.fixture
def words(tiny, references, adapter, tmp_path):
    """Words after `evaluate`, for the random tiny Mochi with an adapter."""
    made = settings(tiny, references, tmp_path / "cache")
    run = ["--run.folder", str(tmp_path / "run"), "--adapter", str(adapter), "--evaluation.trigger", "bbb style"]
    return [*made, *run, *few(video_text="null")]


def test_clips_without_the_trigger_are_no_examples_of_the_style(clips, judge, references, tmp_path):
    """They keep the model's own look as it was; taken for examples, they would say that the base has the style already."""
    mixed = shutil.copytree(references, tmp_path / "mixed" / "chalk").parent
    draw_clips(mixed / "plain", DrawnSet("base", 4, seed=1))
    assert judge(clips, data=mixed) == 0
    counts = results(clips)["settings"]
    assert (counts["reference clips"], counts["training clips"]) == ("5", "9")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "no prompt to evaluate: give evaluation.prompts"),
        (["--evaluation.prompts", f"['{FOX}', a ball]"], "the trigger 'bbb style' is missing in prompt 'a ball'"),
        (["--evaluation.prompts", f"['{FOX}']", "--evaluation.trigger", ""], "evaluation.trigger is empty"),
        (["--evaluation.prompts", "[bbb style ✿✿ 山 川 海]"], "T5"),
        (
            ["--evaluation.prompts", f"['{FOX}']", "--adapter", "nowhere.safetensors"],
            "nowhere.safetensors: there is no such",
        ),
        (
            ["--evaluation.prompts", f"['{FOX}']", "--evaluation.references", "nowhere"],
            "evaluation.references: nowhere does",
        ),
        (["--evaluation.prompts", f"['{FOX}']", "--backbones.video_text", "drawn-world"], "not a sentence of the drawn world"),
    ],
)
def test_a_call_that_cannot_work_ends_before_any_video_is_made(words, tmp_path, capsys, more, expected):
    assert main(["evaluate", *words, *more]) == 1
    assert expected in said(capsys)
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.slow
def test_an_adapter_that_does_not_say_its_alpha_is_refused_and_taken_when_told(words, adapter, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    bare = tmp_path / "bare.safetensors"
    save_file(load_file(adapter), bare)
    call = ["evaluate", "--quick", *words, "--evaluation.prompts", f"['{FOX}', '{HILL}']", "--adapter", str(bare)]
    assert main(call) == 1
    assert "pass --assume-alpha rank" in said(capsys)
    assert main([*call, "--assume-alpha", "rank"]) == 0


@pytest.mark.slow
def test_a_quick_evaluation_leaves_everything_behind_and_makes_nothing_twice(words, tmp_path, capsys):
    call = ["evaluate", "--quick", *words, "--evaluation.prompts", f"['{FOX}', '{HILL}']", *CONSE]
    assert main(call) == 0
    folder = tmp_path / "run" / "evaluation"
    assert {path.name for path in folder.iterdir() if path.is_file()} == {f"quick-{name}" for name in REPORT_FILES}
    found = results(folder, "quick-results.json")
    assert found["quick"] is True
    assert found["verdict"]["headline"].startswith("Indicative only")
    assert [point["strength"] for point in found["sweep"]["points"]] == [0.0, 0.5, 1.0]
    assert {one["prompt_set"] for one in found["comparisons"]} == {"trigger"}
    assert {one["p_value"] for one in found["comparisons"]} == {None}
    assert {one["conclusion"] for one in found["comparisons"]} == {"indicative", "context"}
    assert len((folder / "quick-clips.jsonl").read_text().splitlines()) == 2 * 4
    gaps = {gap["what"]: gap["because"] for gap in found["missing"]}
    assert {gaps[part] for part in ("bleed", "curve", "losses")} == {"a quick look leaves this out"}
    assert "one seed" in gaps["diversity"]
    assert "the same number" in gaps["quality.background_consistency"]
    assert "quality.subject_consistency" in found["incomparable"]
    assert "quality.warp_error" not in found["incomparable"], "no network measures it"
    assert "diversity" not in found["incomparable"], "it is not there"
    capsys.readouterr()
    made = {path: path.stat().st_mtime_ns for kind in ("mp4", "safetensors") for path in folder.glob(f"*/**/*.{kind}")}
    assert main(call) == 0
    assert "6 of 6 are there already" in said(capsys)
    assert {path: path.stat().st_mtime_ns for path in made} == made


def die_at_the_third_video() -> None:
    write, made = videos.write_video, []

    def two(*told):
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*told)
        made.append(1)

    videos.write_video = two


@pytest.mark.slow
def test_eight_prompts_killed_half_way_go_on_where_they_were(words, tmp_path, capsys):
    prompts = [f"bbb style, {number} red balls on a hill" for number in range(1, 9)]
    call = ["evaluate", "--quick", *words, "--evaluation.prompts", json.dumps(prompts)]
    log = tmp_path / "log"
    assert ended(start(call, log, before=die_at_the_third_video)) == -signal.SIGKILL, log.read_text()
    folder = tmp_path / "run" / "evaluation"
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert len(first) == 2
    assert not (folder / "quick-report.html").exists()
    assert main(call) == 0
    assert "2 of 24 are there already" in said(capsys)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert len((folder / "quick-clips.jsonl").read_text().splitlines()) == 4 * 8
    assert (folder / "quick-report.html").is_file()


@pytest.mark.slow
def test_strength_zero_is_the_base_bit_for_bit_and_a_sweep_may_leave_one_out(words, tmp_path):
    sets = ["--evaluation.prompts", f"['{FOX}', '{HILL}']", "--evaluation.unrelated", "[a cup on a table]"]
    call = ["evaluate", *words, *sets, *CONSE, "--evaluation.strengths", "[0.0, 0.5]", "--evaluation.seeds", "1"]
    assert main([*call, "--evaluation.training_captions", "2"]) == 0
    folder = tmp_path / "run" / "evaluation"
    found = results(folder)
    assert found["strength_zero_is_base"] is True
    assert "bit for bit" in (folder / "report.html").read_text(encoding="utf-8")
    assert [point["strength"] for point in found["sweep"]["points"]] == [0.0, 0.5, 1.0]
    gaps = {gap["what"]: gap["because"] for gap in found["missing"]}
    assert "2 prompts are too few" in gaps["tests on trigger prompts"]
    assert "are needed" in gaps["bleed"]
    assert "not encoded" in gaps["losses"]
    assert found["verdict"]["worked"] is None
    assert len(list((folder / "base").glob("*.mp4"))) == 2 + 2 + 1 + 2  # trigger, plain, unrelated, training captions


@pytest.mark.slow
def test_no_strengths_make_no_sweep(words, tmp_path):
    sets = [
        "--evaluation.prompts",
        f"['{FOX}', '{HILL}']",
        "--evaluation.unrelated",
        "[]",
        "--evaluation.training_captions",
        "0",
    ]
    assert main(["evaluate", *words, *sets, "--evaluation.strengths", "[]", "--evaluation.seeds", "1"]) == 0
    found = results(tmp_path / "run" / "evaluation")
    assert (found["sweep"], found["grids"], found["strength_zero_is_base"]) == (None, [], None)


@pytest.mark.slow
def test_the_report_goes_into_the_runs_wandb_once(words, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    run.mkdir()
    history = run / "metrics.jsonl"
    history.write_text('{"step": 3, "time": 0.0, "kind": "train", "loss": 1.0}\n')
    tracked = ["--tracking.trackers", "[wandb]", "--tracking.wandb_mode", "offline"]
    call = ["evaluate", "--quick", *words, "--evaluation.prompts", f"['{FOX}', '{HILL}']", *tracked]
    assert main(call) == 0
    assert "evaluation" not in history.read_text(), "an adapter from elsewhere is none of this run's"
    ours = str(shutil.copy(adapter, run))
    for _ in range(2):
        assert main([*call, "--adapter", ours]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (ours,) = [record for record in records if record["kind"].startswith("evaluation ")]
    assert (ours["step"], ours["report"]) == (3, "evaluation/quick-report.html")
    assert "evaluation/trigger/style.descriptor" in ours
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    logged = [
        record
        for path in files
        for record in wandb_records(path)
        if record.HasField("history") and "evaluation/report" in str(record)
    ]
    assert len(logged) == 1
    assert list((run / "wandb").glob("offline-run-*/files/media/html/**/*.html"))
    assert list((run / "wandb").glob("offline-run-*/files/media/videos/**/*.mp4"))


def test_clips_made_elsewhere_are_judged_where_they_lie(judge, clips):
    assert judge(clips) == 0
    found = results(clips)
    assert (found["sweep"], found["strength_zero_is_base"], found["grids"]) == (None, None, [])
    elsewhere = {gap["what"] for gap in found["missing"] if gap["because"].startswith("the clips were made elsewhere")}
    assert elsewhere == {"sweep", "curve", "losses"}
    assert "made elsewhere" in found["base_model"], "the configuration's base made none of these"
    assert set(found["truth"]) == {"Style, 0 base to 1 chalk", "Colour right", "Shape right", "Motion right"}


def test_a_video_that_is_cut_short_is_named(judge, clips, capsys):
    broken = clips / "adapter" / "trigger-1.mp4"
    broken.write_bytes(broken.read_bytes()[:-200])
    assert judge(clips) == 1
    assert "trigger-1.mp4" in said(capsys)
    assert not (clips / "report.html").exists()


def test_a_quick_look_replaces_nothing_of_the_full_evaluation(judge, clips):
    assert judge(clips) == 0

    def of_the_full_one() -> dict[str, bytes]:
        written = [*clips.glob("*"), *clips.glob("nearest/*")]
        names = [path for path in written if path.is_file() and not path.name.startswith("quick-")]
        return {str(path.relative_to(clips)): path.read_bytes() for path in names}

    before = of_the_full_one()
    assert {"report.html", "results.json", "clips.jsonl", "nearest/0.png"} <= set(before)
    assert judge(clips, *few(), "--quick") == 0
    assert of_the_full_one() == before
    found = results(clips, "quick-results.json")
    assert (clips / "quick-report.html").is_file()
    assert {row["picture"].split("/")[0] for row in found["memorisation"]["nearest"] if row["picture"]} == {"quick-nearest"}


def test_a_backbone_that_cannot_be_had_is_a_gap_and_no_zero(judge, clips, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert judge(clips, *few(style="nobody/no-such-style")) == 0
    assert "not measured (style)" in said(capsys)
    found = results(clips)
    assert "nobody/no-such-style" in {gap["what"]: gap["because"] for gap in found["missing"]}["style.descriptor"]
    assert "style.descriptor" not in {one["measure"] for one in found["comparisons"]}
    assert found["verdict"]["worked"] is None
    assert "style was not measured, because" in found["verdict"]["headline"]


def test_without_the_data_set_style_and_copies_are_gaps_that_say_so(judge, clips, capsys, tmp_path):
    assert judge(clips, data=tmp_path / "gone") == 0
    assert "does not exist: nothing is compared with training clips" in said(capsys)
    gaps = {gap["what"]: gap["because"] for gap in results(clips)["missing"]}
    assert "evaluation.references or data.clips" in gaps["style.descriptor"]
    assert "no training clip" in gaps["memorisation"]


def test_without_a_network_for_text_the_verdict_says_what_to_set(judge, clips):
    assert judge(clips, *few(video_text="null")) == 0
    found = results(clips)
    gaps = {gap["what"]: gap["because"] for gap in found["missing"]}
    assert "backbones.text and backbones.video_text are null" in gaps["align.video"]
    assert "backbones.text and backbones.video_text are null" in found["verdict"]["headline"]


def test_clips_none_of_which_has_the_trigger_are_refused(judge, clips, capsys):
    listed = clips / "videos.jsonl"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    listed.write_text("".join(json.dumps({key: line[key] for key in line if key != "set"}) + "\n" for line in lines))
    assert judge(clips, trigger="clay style") == 1
    assert "the trigger 'clay style' is in none of the prompts" in said(capsys)


def test_another_output_is_refused_where_the_clips_lie_elsewhere(judge, clips, tmp_path, capsys):
    assert judge(clips, *few(), "--output", str(tmp_path / "out")) == 1
    assert "leave it out" in said(capsys)


@pytest.mark.slow
def test_quick_takes_the_trigger_prompts_alone(judge, tmp_path):
    folder = write_clips(tmp_path / "more", {"trigger": (9, restyled("chalk")), "plain": (1, restyled("base"))})
    assert judge(folder, *few(), "--quick") == 0
    found = results(folder, "quick-results.json")
    assert found["settings"]["prompts"] == "8 trigger"
    assert {pair["prompt_set"] for pair in found["pairs"]} == {"trigger"}
