"""`mochi-lora caption`: every clip once, whatever happens; a person's words win."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
from footage import make_clip
from tiny_captioner import write_captioner
from tiny_commands import ROOT, TINY_ROAD, make_image, make_sound

from mochi_lora.cli import main
from mochi_lora.commands import caption as room
from mochi_lora.curation.caption_sheet import read_sheet
from mochi_lora.curation.captioner import Captioner
from mochi_lora.model.text import load_tokenizer, tokenise

SENTENCE = "A red fox runs across the snow while the camera pans left."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_captioner(tmp_path_factory.mktemp("vlm") / "scripted", f'Here is the caption: "{SENTENCE}"')


@pytest.fixture
def table(tmp_path):
    """prepared/clips.jsonl: four clips of one film, one captioned, one refused, one of a file that is no video."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    make_clip(tmp_path / "film.mp4", frames=60)
    make_sound(tmp_path / "sound.m4v")
    rows = [
        {"file_name": "../film.mp4", "start": 0.0, "end": 0.6, "text": "", "shot": 0, "refused": None},
        {"file_name": "../film.mp4", "start": 0.6, "end": 1.2, "text": "Mine already.", "shot": 0, "refused": None},
        {"file_name": "../film.mp4", "start": 1.2, "end": 1.8, "text": "", "shot": 1, "refused": None},
        {"file_name": "../film.mp4", "start": 1.8, "end": 2.0, "text": "", "shot": 1, "refused": "too dark"},
        {"file_name": "../sound.m4v", "start": 0.0, "end": 0.6, "text": "", "shot": 0, "refused": None},
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "clips.jsonl"


@pytest.fixture
def caption(tiny, table, model):
    """Runs the command over the table; more words change settings."""

    def run(*words):
        settings = ("--model.base", str(tiny), "--prepare.folder", str(table.parent), "--caption.model", str(model))
        return main(["caption", "--config", str(TINY_ROAD), *settings, "--caption.batch", "2", *words])

    return run


def texts(table):
    return [json.loads(line)["text"] for line in table.read_text().splitlines()]


def lines(table):
    return [json.loads(line) for line in (table.parent / "captions.jsonl").read_text().splitlines()]


def correct(table, number, text):
    """As a person does, in an editor."""
    changed = [{**line, "text": text} if at == number else line for at, line in enumerate(lines(table))]
    (table.parent / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


@pytest.fixture
def questions(monkeypatch):
    """How many clips each question was about."""
    asked, ask = [], Captioner.ask

    def counted(self, looks, instruction=None):
        asked.append(len(looks))
        return ask(self, looks, instruction)

    monkeypatch.setattr(Captioner, "ask", counted)
    return asked


def test_clips_without_a_caption_get_one_and_the_others_are_left_alone(caption, table, tiny, capsys):
    before = [json.loads(line) for line in table.read_text().splitlines()]
    assert caption("--caption.trigger", "chalk style") == 0
    said = f"chalk style, {SENTENCE[0].lower()}{SENTENCE[1:]}"
    assert texts(table) == [said, "Mine already.", said, "", ""]
    after = [json.loads(line) for line in table.read_text().splitlines()]
    assert [{**row, "text": ""} for row in after] == [{**row, "text": ""} for row in before]
    first, second = lines(table)
    assert (first["start"], second["start"]) == (0.0, 1.2)
    assert first["raw"] == f'Here is the caption: "{SENTENCE}"'
    assert first["model"].startswith("scripted@")
    assert first["edited"] is False
    assert first["tokens"] == len(tokenise(load_tokenizer(tiny / "tokenizer"), [said])[0].ids)
    printed = capsys.readouterr().out
    assert "sound.m4v" in printed
    assert "holds no video" in printed
    assert "film.mp4@0.6s" in printed  # has a caption of its own, without the trigger


def test_a_second_run_asks_nothing_and_changes_nothing(caption, table, questions):
    assert caption() == 0
    assert questions == [2]
    before = {path.name: path.read_bytes() for path in table.parent.iterdir()}
    (table.parents[1] / "sound.m4v").unlink()
    assert caption() == 0
    assert questions == [2]
    assert {path.name: path.read_bytes() for path in table.parent.iterdir()} == before


def test_the_trigger_is_the_evaluations_unless_told_otherwise(caption, table):
    assert caption("--evaluation.trigger", "chalk style", "--caption.trigger_position", "end") == 0
    assert texts(table)[0] == f"{SENTENCE[:-1]}, chalk style."


def test_a_correction_wins_and_survives_every_later_run(caption, table, questions):
    assert caption() == 0
    correct(table, 0, "A wolf, in truth.")
    assert caption() == 0
    assert texts(table)[0] == "A wolf, in truth."
    assert (lines(table)[0]["edited"], lines(table)[1]["edited"]) == (True, False)
    assert caption("--caption.overwrite", "true", "--caption.frames", "3") == 0
    assert texts(table)[:3] == ["A wolf, in truth.", SENTENCE, SENTENCE]
    assert sum(questions) == 2 + 2  # not the corrected one


def test_a_correction_is_taken_over_once_and_does_not_undo_a_later_change_in_the_table(caption, table):
    assert caption() == 0
    correct(table, 0, "A wolf, in truth.")
    assert caption() == 0
    table.write_text(table.read_text().replace("A wolf, in truth.", "A dog after all."))
    assert caption() == 0
    assert texts(table)[0] == "A dog after all."


def test_a_correction_needs_no_model(caption, table):
    assert caption() == 0
    correct(table, 1, "Hand-written.")
    assert caption("--caption.model", "null") == 0
    assert texts(table)[2] == "Hand-written."


def test_a_table_made_anew_gets_its_captions_back(caption, table, questions):
    fresh = table.read_text()
    assert caption() == 0
    table.write_text(fresh)
    assert caption() == 0
    assert texts(table)[0] == SENTENCE
    assert sum(questions) == 2


def test_overwriting_with_another_trigger_asks_nobody_again(caption, table, questions):
    assert caption("--caption.overwrite", "true") == 0
    assert texts(table)[:3] == [SENTENCE] * 3
    assert caption("--caption.overwrite", "true", "--caption.trigger", "chalk") == 0
    assert texts(table)[:3] == [f"chalk, a{SENTENCE[1:]}"] * 3
    assert sum(questions) == 3


def test_what_is_too_long_is_shortened_at_a_sentence_end_and_said(caption, table, tiny, tmp_path, capsys):
    names = ["".join(syllables) for syllables in product(("ba", "ko", "lu"), ("mi", "ro", "se"), ("na", "ti", "vo"), "sx")]
    folder = write_captioner(tmp_path / "talker", " ".join(f"The {name} runs." for name in names))
    assert caption("--caption.model", str(folder), "--caption.trigger", "chalk", "--caption.trigger_position", "end") == 0
    text = texts(table)[0]
    body = text.removesuffix(", chalk.")
    told = body.split(". ")
    assert told == [f"The {name} runs" for name in names[: len(told)]]
    longer = f"{body}. The {names[len(told)]} runs, chalk."
    tokenizer = load_tokenizer(tiny / "tokenizer")
    assert not tokenise(tokenizer, [text])[0].truncated
    assert tokenise(tokenizer, [longer])[0].truncated
    assert "shortened to 256 tokens" in capsys.readouterr().out


def test_an_answer_in_another_language_is_listed_and_left_to_a_person(caption, table, tmp_path, questions, capsys):
    folder = write_captioner(tmp_path / "other", "Лиса бежит по снегу.")
    words = ("--caption.model", str(folder))
    assert caption(*words) == 0  # one clip has a caption of its own
    assert "not English" in capsys.readouterr().out
    assert texts(table)[0] == ""
    assert caption(*words) == 0
    assert sum(questions) == 2  # the same question would get the same answer
    correct(table, 0, "A fox.")
    assert caption(*words) == 0
    assert texts(table)[:1] == ["A fox."]
    assert caption() == 0  # another model may do better
    assert texts(table)[:3] == ["A fox.", "Mine already.", SENTENCE]


def test_a_folder_of_clips_gets_text_files(caption, tmp_path):
    folder = tmp_path / "clips"
    make_image(folder / "one.png", caption="A ball.")
    make_image(folder / "two.png", caption=None)
    assert caption("--caption.clips", str(folder)) == 0
    assert (folder / "one.txt").read_text() == "A ball."
    assert (folder / "two.txt").read_text() == f"{SENTENCE}\n"


def test_without_a_model_the_sheet_has_a_line_to_fill_in_for_every_clip(caption, table, capsys):
    table.write_text(table.read_text().replace("Mine already.", ""))
    assert caption("--caption.model", "null") == 0
    assert "4 clips wait for their captions in the sheet" in capsys.readouterr().out.replace("\n", " ")
    assert [(line["start"], line["end"], line["text"]) for line in lines(table)] == [
        (0.0, 0.6, ""),
        (0.6, 1.2, ""),
        (1.2, 1.8, ""),
        (0.0, 0.6, ""),
    ]  # not the one that the filter refused
    before = (table.parent / "captions.jsonl").read_bytes()
    for more in ((), ("--caption.overwrite", "true")):
        assert caption("--caption.model", "null", *more) == 0
        assert (table.parent / "captions.jsonl").read_bytes() == before
    correct(table, 1, "By hand.")
    assert caption("--caption.model", "null") == 0
    assert texts(table) == ["", "By hand.", "", "", ""]
    assert [line["edited"] for line in lines(table)] == [False, True, False, False]


def test_a_model_is_asked_about_lines_that_nobody_has_filled_in(caption, table, questions):
    assert caption("--caption.model", "null") == 0
    correct(table, 0, "By hand.")
    assert caption() == 0
    assert texts(table)[:3] == ["By hand.", "Mine already.", SENTENCE]
    assert sum(questions) == 1


def test_a_caption_file_that_cannot_be_read_costs_no_other_clip_its_caption(caption, tmp_path, capsys):
    folder = tmp_path / "clips"
    make_image(folder / "a.png", caption=None)
    make_image(folder / "b.png", caption=None)
    (folder / "a.txt").write_bytes("Ein M\u00e4dchen".encode("latin-1"))
    assert caption("--caption.clips", str(folder)) == 1
    assert (folder / "b.txt").read_text() == f"{SENTENCE}\n"
    assert (folder / "a.txt").read_bytes() == "Ein M\u00e4dchen".encode("latin-1")
    printed = capsys.readouterr()
    table = " ".join(printed.out.replace("\u2502", " ").split())
    assert "no caption" in table
    assert "a.png" in table
    assert "is not UTF-8 (byte 5)" in table
    assert "of 2 clips" in table
    assert "1 of 2 clips has a caption file that cannot be read" in printed.err
    (folder / "a.txt").unlink()
    assert caption("--caption.clips", str(folder)) == 0


def test_without_any_caption_the_command_fails(caption, tmp_path, capsys):
    make_sound(tmp_path / "clips.m4v")
    (tmp_path / "alone").mkdir()
    shutil.move(tmp_path / "clips.m4v", tmp_path / "alone")
    assert caption("--caption.clips", str(tmp_path / "alone")) == 1
    assert "no clip has a caption" in capsys.readouterr().err


def test_a_model_that_cannot_be_had_is_named_with_what_to_do(caption, table, capsys):
    assert caption("--caption.model", "./nowhere") == 1
    told = capsys.readouterr().err
    assert "./nowhere" in told
    assert "caption.model: null" in told


def test_without_a_prepared_table_the_next_step_is_told(caption, table, capsys):
    table.unlink()
    assert caption() == 1
    assert "mochi-lora prepare" in capsys.readouterr().err


KILLED = """
import os, sys
from mochi_lora.cli import main
from mochi_lora.commands import caption

append, left = caption.append_line, [int(sys.argv[1])]

def dying(path, line):
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    append(path, line)

caption.append_line = dying
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_killed_run_loses_nothing_and_doubles_nothing(tiny, table, model, questions):
    words = ["caption", "--config", str(TINY_ROAD), "--model.base", str(tiny), "--prepare.folder", str(table.parent)]
    words += ["--caption.model", str(model), "--caption.batch", "1", "--caption.overwrite", "true"]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run([sys.executable, "-c", KILLED, "2", *words], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == -9
    assert len(read_sheet(table.parent / "captions.jsonl")) == 2
    assert texts(table)[0] == ""
    assert main(words) == 0
    assert questions == [1]
    assert texts(table)[:3] == [SENTENCE] * 3
    assert [line["start"] for line in lines(table)] == [0.0, 0.6, 1.2]


def test_a_full_gpu_is_told_with_what_makes_it_fit(caption, monkeypatch, capsys):
    def full(*_):
        raise room.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(Captioner, "ask", full)
    assert caption() == 1
    assert "caption.batch" in capsys.readouterr().err
