"""The sheet of a data set: what stands out, what is shown, and that one page holds it all."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import av
import huggingface_hub
import pytest
from footage import H264, make_clip
from tiny_commands import EXAMPLES, config_of, make_image, make_video, mixed, settings

from mochi_lora.cli import main
from mochi_lora.commands import sheet as command
from mochi_lora.data.clip_plan import ClipPlan
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import UserError
from mochi_lora.report import dataset_rows
from mochi_lora.report.dataset_page import Sheet, headline, write_sheet
from mochi_lora.report.dataset_plots import dataset_panels
from mochi_lora.report.dataset_problems import problems
from mochi_lora.report.dataset_rows import ClipRow, Counted, LeftOut, Limits, Note, left_out_before, marked
from mochi_lora.report.plots import Axes, histogram
from mochi_lora.spec import Bucket

NASTY = """<script>alert('x')</script> & "quoted" chalk"""
LIMITS = Limits(0.1, 0.1)


def row(name: str, caption: str = "", *, unused: float = 0.0, **more) -> ClipRow:
    source = ClipSource(Path(f"/films/{name}.mp4"), caption or f"chalk, a film called {name}")
    plan = ClipPlan(source, Bucket(13, 32, 48), 96, 64, 0.434 + unused, unused, 13, is_configured=True)
    return ClipRow(plan, part=0, trigger="chalk", **more)


def moving(speed: float, refused: str | None = None) -> Note:
    return Note({"motion": speed}, (), refused)


def marks(*rows: ClipRow) -> dict[str, tuple[str, ...]]:
    return {item.plan.source.path.stem: item.marks for item in marked(rows, LIMITS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table with a clip for every fate."""
    made = tmp_path_factory.mktemp("sheet")
    lines = []
    for number, path in enumerate(sorted(EXAMPLES.glob("0[1-3]_*.mp4"))):
        shutil.copy(path, made)
        text = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        measures = {"motion": 2.0 + number, "hashes": ["0f"], "bars": None, "width": 424}
        lines.append({"file_name": path.name, "text": text, "measures": measures, "flags": ["letterbox"]})
    make_video(made / "nasty.mp4", frames=7)
    lines.append({"file_name": "nasty.mp4", "start": 0, "end": None, "text": NASTY})
    lines[-1] |= {"measures": {"motion": 0.05}, "flags": [NASTY, "<b>"], "refused": f"{NASTY}: 3 is below 20"}
    (made / "broken.mp4").write_text("not a film")
    lines += [{"file_name": "broken.mp4", "text": "bbb style, no film"}, {"file_name": "gone.mp4", "text": "bbb style, gone"}]
    make_image(made / "mute.png")
    lines.append({"file_name": "mute.png", "text": ""})
    (made / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return made


def made(tiny: Path, folder: Path, page: Path, *more: str, most_strips: int = 240) -> str:
    words = settings(tiny, folder / "clips.jsonl", page.parent / "cache", "7x32x48")
    command.run(config_of([*words, "--evaluation.trigger", "bbb style", *more]), output=page, most_strips=most_strips)
    return page.read_text(encoding="utf-8")


def test_the_page_shows_every_clip_and_needs_nothing_else(tiny, folder, tmp_path):
    page = made(tiny, folder, tmp_path / "page.html")
    assert len(re.findall(r"<article ", page)) == 4
    assert (
        len(re.findall(r'<img src="data:image/jpeg;base64,[\w+/=]+" alt="Frames of', page)) == 5
    )  # and mute.png, which lacks a caption
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == []
    assert "4 clips to train on: 0.9 s of film" in page
    assert "<mark>bbb style</mark>, a huge pink cumulus cloud" in page
    assert "letterbox" in page
    assert "motion 4.00" in page
    assert "hashes" not in page
    assert re.search(r"<strong>7x32x48</strong>, \d+ T5 tokens<br>7 frames at 30 fps", page)


def test_captions_are_text_and_nothing_else(tiny, folder, tmp_path):
    page = made(tiny, folder, tmp_path / "page.html")
    assert len(re.findall(r"<script", page)) == 1
    assert unescape(page).count(NASTY) >= 3, "caption, flag, refusal"
    assert "<b>" not in page
    assert NASTY not in page


def test_what_encode_would_refuse_is_listed_with_its_reason(tiny, folder, tmp_path):
    page = unescape(made(tiny, folder, tmp_path / "page.html"))
    lost = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page[page.index('id="left-out"') :]))
    told = {Path(name.split(" (")[0]).name: reason for name, reason in lost.items()}
    assert told.keys() == {"broken.mp4", "gone.mp4", "mute.png"}
    assert "cannot be read as video" in told["broken.mp4"]
    assert "no such file" in told["gone.mp4"]
    assert "caption is empty" in told["mute.png"]


def test_frames_are_in_the_page_for_so_many_clips_those_that_stand_out_first(tiny, folder, tmp_path):
    page = made(tiny, folder, tmp_path / "page.html", most_strips=1)
    assert re.findall(r'alt="Frames of (.*?),', page) == [str(folder / "nasty.mp4")]
    assert "carries the frames of 1 of 4 clips, those that stand out first (at most 1)" in page
    assert len(re.findall(r"<article ", page)) == 4


def test_a_clip_that_turns_out_unreadable_is_told_and_the_others_shown(tiny, tmp_path):
    """Damaged in the middle: the plan, which decodes nothing, cannot know."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("whole.mp4", "damaged.mp4"):
        clip = make_clip(folder / name, frames=90, codec=("-vf", "noise=alls=60:allf=t", *H264))
        clip.with_suffix(".txt").write_text(f"bbb style, {name}")
    with av.open(str(clip)) as container:
        position, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][17]
    content = bytearray(clip.read_bytes())
    content[position + size // 2 : position + size // 2 + 40] = bytes(range(40))
    clip.write_bytes(content)
    config = config_of(settings(tiny, folder, tmp_path / "cache", "37x32x64"))
    command.run(config, output=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r'alt="Frames of \S+/(.*?),', page) == ["whole.mp4"]
    assert re.search(r"Cannot be shown: \S+/damaged\.mp4: damaged at 0\.\d+ s", page)
    assert "1 clip whose frames cannot be read" in page


def test_a_model_that_is_not_here_is_not_downloaded_for_its_tokens(folder, tmp_path, monkeypatch):
    asked, real = [], huggingface_hub.snapshot_download

    def snapshot_download(*given, **named):
        asked.append(named["local_files_only"])
        return real(*given, **named | {"local_files_only": True})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    page = made(Path("nobody/has-this-model"), folder, tmp_path / "page.html")
    assert "Captions were not counted in T5 tokens: model.base nobody/has-this-model is not on this machine" in page
    assert asked == [True]
    assert "T5 tokens<br>" not in page
    assert '<option value="tokens">' not in page


def test_by_default_the_page_lies_in_the_run_folder(tiny, folder, tmp_path, capsys):
    words = settings(tiny, folder / "clips.jsonl", tmp_path / "cache", "7x32x48")
    assert main(["sheet", *words, "--run.folder", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "dataset.html").is_file()
    printed = capsys.readouterr().out
    assert str(tmp_path / "run" / "dataset.html") in printed
    assert "3 left out" in printed


def test_a_page_that_is_no_html_file_is_refused_before_any_work(tiny, folder, tmp_path):
    with pytest.raises(UserError, match=r"name a file that ends in \.html"):
        made(tiny, folder, tmp_path / "page")


def test_a_mix_is_told_with_its_draws_and_each_part_has_its_trigger(tiny, tmp_path):
    for colour in range(3):
        make_image(tmp_path / "red" / f"{colour}.png", caption=f"ball {colour}", colour=90 * colour)
    make_image(tmp_path / "blue" / "a.png", caption="a blue wall")
    mix = [{"clips": str(tmp_path / "red"), "trigger": "zig"}, {"clips": str(tmp_path / "blue"), "repeats": 3}]
    config = config_of([*mixed(tiny, tmp_path / "cache", mix, "1x32x48"), "--evaluation.trigger", "zag"])
    command.run(config, output=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    cells = re.findall(r'<tr><th>\S+/(red|blue)</th><td class="n">(\d+)</td><td class="n">(\d+)</td>', page)
    assert cells == [("red", "3", "3"), ("blue", "1", "3")]
    assert page.count("<mark>zig</mark>, ball") == 3
    assert "1 clip without the trigger" in page


def test_nothing_to_train_on_is_said(tmp_path):
    lost = [LeftOut("a.mp4", "no caption")]
    write_sheet(tmp_path / "page.html", Sheet("clips", "base", [], lost, []))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "There is no clip to train on" in page
    assert "no caption" in page


# --- what stands out ----------------------------------------------------------------------------------------------------


def test_each_mark_falls_on_its_clip_alone():
    found = marks(
        row("plain", note=moving(2.0)),
        row("uncalled", "a fox"),
        row("shouted", "CHALK, an owl"),
        row("twin", "chalk, two"),
        row("other", "Chalk,  TWO"),
        row("long", counted=Counted(256, truncated=True, unknown_share=0.0)),
        row("foreign", counted=Counted(9, truncated=False, unknown_share=0.2)),
        row("still", note=moving(0.39)),
        row("lively", note=moving(2.1)),
        row("kept", note=moving(2.2, refused="blurred: 3 is below 20")),
        row("cut", unused=0.1),
    )
    assert found == {
        "plain": (),
        "uncalled": (dataset_rows.NO_TRIGGER,),
        "shouted": (),
        "twin": (dataset_rows.SAME_CAPTION,),
        "other": (dataset_rows.SAME_CAPTION,),
        "long": (dataset_rows.CUT_CAPTION,),
        "foreign": (dataset_rows.UNKNOWN_WORDS,),
        "still": (dataset_rows.LITTLE_MOTION,),
        "lively": (),
        "kept": (dataset_rows.FILTER_REFUSED,),
        "cut": (dataset_rows.TRIMMED,),
    }


def test_the_filters_limit_counts_where_it_is_above_a_fifth_of_the_median():
    rows = [row("a", note=moving(0.3)), row("b", note=moving(0.5))]
    assert [item.marks for item in marked(rows, Limits(0.1, 0.4))] == [(dataset_rows.LITTLE_MOTION,), ()]
    assert [item.marks for item in marked(rows, Limits(0.1, None))] == [(), ()]


def test_one_video_that_outweighs_the_others_is_named():
    rows = [row("one", f"chalk {number}") for number in range(3)] + [row("two")]
    (problem,) = problems(rows, [], validates=True)
    assert "75\N{NO-BREAK SPACE}% of the clips are from one video (/films/one.mp4)" in problem.text
    even = [row("one"), row("one", "chalk b"), row("two"), row("two", "chalk d")]
    assert problems(even, [], validates=True) == []


def test_a_single_video_leaves_nothing_to_hold_out():
    rows = [row("one", f"chalk {number}") for number in range(4)]
    (problem,) = problems(rows, [], validates=True)
    assert "none can be held out" in problem.text
    assert problems(rows, [], validates=False) == []


def test_more_lost_than_used_is_a_problem():
    lost = [LeftOut("a", "short"), LeftOut("b", "short")]
    assert "More is left out (2) than used (1)" in problems([row("one")], lost, validates=True)[0].text
    assert problems([row("one"), row("two")], lost, validates=True) == []


def test_the_trigger_is_found_wherever_it_stands():
    parts = row("a", "A Chalk drawing, CHALK again").caption_parts
    assert parts == [("A ", False), ("Chalk", True), (" drawing, ", False), ("CHALK", True), (" again", False)]


def test_a_trigger_inside_another_word_calls_nothing():
    pink = replace(row("pink", "A pink flamingo, chalked"), trigger="ink")
    assert pink.caption_parts == [("A pink flamingo, chalked", False)]
    assert dataset_rows.NO_TRIGGER in marked([pink], Limits(0.1, None))[0].marks


def test_images_are_not_film():
    still = ClipRow(
        ClipPlan(ClipSource(Path("a.png"), "x"), Bucket(1, 32, 48), 96, 64, 0.0, 0.0, 1, is_configured=True), part=0
    )
    assert headline([still]) == "1 image to train on: no film"
    assert headline([row("a"), still, still]).startswith("1 clip and 2 images to train on: 0.4 s of film")


# --- what prepare has left out -------------------------------------------------------------------------------------------


def test_videos_and_clips_that_prepare_left_out_are_read_beside_its_table(tmp_path):
    measures = {"black": 0, "luma": 0, "motion": 1, "sharpness": 1, "flicker": 0, "change": 0, "bars": None}
    measures |= {"width": 1, "height": 1, "hashes": []}
    line = {"file_name": "a.mp4", "start": 1.5, "end": 2.5, "text": "", "crop": None, "source": "a.mp4", "shot": 0}
    line |= {"measures": measures, "flags": [], "refused": "black: 1 is above 0"}
    (tmp_path / "refused.jsonl").write_text(json.dumps(line) + "\n")
    footage = [{"source": "b.mp4", "refused": "the file is empty"}, {"source": "a.mp4", "clips": 3}]
    (tmp_path / "footage.jsonl").write_text("".join(json.dumps(item) + "\n" for item in footage))
    found = [(lost.name, lost.reason) for lost in left_out_before(tmp_path / "clips.jsonl")]
    assert found == [("b.mp4", "the file is empty"), ("a.mp4@1.5s", "black: 1 is above 0")]
    assert left_out_before(tmp_path / "metadata.jsonl") == []


# --- plots ---------------------------------------------------------------------------------------------------------------


def test_columns_are_as_high_as_their_counts():
    drawn = histogram("said", [0.0, 1.0, 2.0, 3.0], [2, 0, 8], Axes("x", "y"))
    heights = [float(height) for height in re.findall(r'class="column"[^>]* height="([\d.]+)"', drawn)]
    assert len(heights) == 2, "an empty bin has no column"
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.3)
    assert 'aria-label="said"' in drawn


def test_plots_are_titled_with_what_they_show():
    rows = [
        row(f"{at}", unused=at * 0.2, note=moving(2.0), counted=Counted(10 + at, truncated=False, unknown_share=0.0))
        for at in range(4)
    ]
    titles = [panel.title for panel in dataset_panels(rows, 0.1)]
    assert titles == [
        "Half of the clips are 0.734 s or longer; 41\N{NO-BREAK SPACE}% of the film is not used",
        "All clips are 96x64 pixels",
        "Everything moves about as much as the rest",
        "Captions have 10 to 13 T5 tokens",
    ]


def test_what_was_not_measured_has_no_plot():
    assert [panel.title for panel in dataset_panels([row("a")], 0.1)] == [
        "Half of the clips are 0.434 s or longer; 0\N{NO-BREAK SPACE}% of the film is not used",
        "All clips are 96x64 pixels",
    ]


# --- clips that are not trained on, shown ----------------------------------------------------------------------------------


def shown_left_out(page: str) -> dict[str, tuple[bool, str]]:
    """File name -> (whether its frames are there, the reason)."""
    rows = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", unescape(page[page.index('id="left-out"') :]))
    return {Path(name.split(" (")[0]).name: ("data:image/jpeg" in reason, re.sub("<.*?>", "", reason)) for name, reason in rows}


def refused_line(name: str, start: float) -> dict:
    measures = {"black": 0, "luma": 0, "motion": 1, "sharpness": 1, "flicker": 0, "change": 0, "bars": None}
    measures |= {"width": 1, "height": 1, "hashes": []}
    line = {
        "file_name": name,
        "start": start,
        "end": start + 0.5,
        "text": "",
        "crop": [0, 0, 40, 30],
        "source": name,
        "shot": 0,
    }
    return {**line, "measures": measures, "flags": [], "refused": "blurred: 3 is below 20"}


def test_clips_without_a_caption_and_what_the_filter_refused_are_shown_with_their_frames(tiny, tmp_path):
    make_video(tmp_path / "film.mp4", frames=40)
    rows = [{"file_name": "film.mp4", "start": 0.25, "end": 1.0, "text": ""}, {"file_name": "gone.mp4", "text": ""}]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (tmp_path / "refused.jsonl").write_text(json.dumps(refused_line("film.mp4", 0.5)) + "\n")
    page = made(tiny, tmp_path, tmp_path / "page.html")
    told = shown_left_out(page)
    assert told["film.mp4"][0]
    assert "caption is empty" in told["film.mp4"][1]
    assert told["film.mp4@0.5s"] == (True, "blurred: 3 is below 20"), told
    assert told["gone.mp4"][0] is False
    assert page.count("data:image/jpeg") == 2
    pictures = re.findall(r'src="(data:image/jpeg[^"]*)"', page)
    assert pictures[0] != pictures[1], "each the frames of its own range"
    assert made(tiny, tmp_path, tmp_path / "page.html", most_strips=1).count("data:image/jpeg") == 1


def test_a_folder_without_captions_is_shown_too(tiny, tmp_path):
    make_video(tmp_path / "clips" / "a.mp4", frames=20)
    make_image(tmp_path / "clips" / "b.png", caption=None)
    (tmp_path / "clips" / "broken.mp4").write_text("no film")
    words = settings(tiny, tmp_path / "clips", tmp_path / "cache", "7x32x48")
    command.run(config_of(words), output=tmp_path / "page.html")
    told = shown_left_out((tmp_path / "page.html").read_text())
    assert {name: shown for name, (shown, _) in told.items()} == {"a.mp4": True, "b.png": True, "broken.mp4": False}
    assert "no caption" in told["broken.mp4"][1]
    assert "cannot be shown" in told["broken.mp4"][1]
