"""The sheet survives kills and keeps a person's work; captions go into tables and text files and nowhere else."""

import json

import pytest

from mochi_lora.curation.caption_sheet import Line, append_line, read_sheet, text_digest, write_sheet
from mochi_lora.curation.caption_table import key_of, list_captionable, store_captions
from mochi_lora.errors import DamagedFileError, UserError


def line(name="a.mp4", text="A fox.", start=0.0, **more):
    return Line(name, text, start, written=text_digest(text), **more)


def texts(sheet):
    return {(key[0].name, key[1]): line.text for key, line in sheet.items()}


def test_appended_lines_are_read_back_whole(tmp_path):
    path = tmp_path / "captions.jsonl"
    told = [line(raw="**Ä fox**", model="m@1", tokens=4, end=1.5, asked="q"), line("b.mp4", "", refused="not English")]
    for one in told:
        append_line(path, one)
    assert list(read_sheet(path).values()) == told
    assert not any(one.corrected for one in told)
    assert list(json.loads(path.read_text().splitlines()[0]))[:3] == ["file_name", "text", "start"]


def test_a_line_torn_by_a_kill_is_cut_off_and_the_next_one_stands_alone(tmp_path):
    path = tmp_path / "captions.jsonl"
    append_line(path, line("a.mp4"))
    whole = path.read_bytes()
    append_line(path, line("ä.mp4"))
    torn = path.read_bytes()
    for length in range(len(whole) + 1, len(torn) - 2):
        path.write_bytes(torn[:length])
        assert texts(read_sheet(path)) == {("a.mp4", 0.0): "A fox."}
        assert path.read_bytes() == whole
    append_line(path, line("c.mp4"))
    assert len(read_sheet(path)) == 2


def test_a_last_line_without_line_break_is_kept(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(line("a.mp4").to_json() + '{"file_name": "b.mp4", "text": "By hand."}')
    assert texts(read_sheet(path)) == {("a.mp4", 0.0): "A fox.", ("b.mp4", 0.0): "By hand."}
    append_line(path, line("c.mp4"))
    assert len(read_sheet(path)) == 3


@pytest.mark.parametrize("broken", ['{"file_name": "a.mp4", "text": "A fox}\n', "[1]\n", '{"file_name": 3, "text": "x"}\n'])
def test_a_line_that_cannot_be_read_is_named_and_not_thrown_away(tmp_path, broken):
    path = tmp_path / "captions.jsonl"
    path.write_text(line().to_json() + broken)
    with pytest.raises(DamagedFileError, match=r"captions\.jsonl:2: "):
        read_sheet(path)
    assert path.read_text().endswith(broken)


def test_a_changed_text_is_a_correction_with_or_without_the_flag(tmp_path):
    path = tmp_path / "captions.jsonl"
    append_line(path, line("a.mp4"))
    append_line(path, line("b.mp4"))
    path.write_text(path.read_text().replace('"b.mp4", "text": "A fox."', '"b.mp4", "text": "A wolf."'))
    first, second = read_sheet(path).values()
    assert (first.corrected, second.corrected) == (False, True)
    taken = second.taken_over(5)
    assert (taken.corrected, taken.edited, taken.tokens) == (False, True, 5)


def test_of_two_lines_for_a_clip_the_correction_counts_else_the_later(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(line(text="old").to_json() + line(text="new").to_json())
    assert texts(read_sheet(path)) == {("a.mp4", 0.0): "new"}
    path.write_text(Line("a.mp4", "mine").to_json() + line(text="new").to_json())
    assert texts(read_sheet(path)) == {("a.mp4", 0.0): "mine"}


def test_somebody_elses_columns_are_kept(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"file_name": "a.mp4", "text": "A fox.", "rating": 5}\n')
    write_sheet(path, read_sheet(path))
    assert json.loads(path.read_text())["rating"] == 5


# --- where captions go --------------------------------------------------------------------------------------------------


ROWS = (
    '{"file_name": "film.mp4", "start": 2.0, "end": 3.0, "text": "", "crop": [0, 8, 64, 56], "measures": {"motion": 0.1}}',
    "",
    '{"file_name": "film.mp4", "start": 0.5, "end": 1.5, "text": "There already.", "crop": null, "flags": ["dark"]}',
    '{"file_name": "film.mp4", "start": 4, "end": 5, "text": "", "refused": "black"}',
)


def test_a_table_gets_its_texts_and_keeps_everything_else(tmp_path):
    table = tmp_path / "clips.jsonl"
    table.write_text("\n".join(ROWS) + "\n")
    clips, _ = list_captionable(table)
    assert [(clip.start, clip.end, clip.caption, clip.crop) for clip in clips] == [
        (0.5, 1.5, "There already.", None),
        (2.0, 3.0, "", (0, 8, 64, 56)),
    ]
    store_captions(table, {key_of(clips[1]): "A fox."})
    after = table.read_text().split("\n")
    assert json.loads(after[0]) == {**json.loads(ROWS[0]), "text": "A fox."}
    assert tuple(after[1:4]) == ROWS[1:]


def test_what_has_nothing_new_is_not_written_again(tmp_path):
    table = tmp_path / "clips.jsonl"
    table.write_text("\n".join(ROWS) + "\n")
    ((first, _), _), before = list_captionable(table), table.stat().st_mtime_ns
    store_captions(table, {key_of(first): "There already."})
    assert table.stat().st_mtime_ns == before


def test_a_folder_gets_text_files_beside_its_clips(tmp_path):
    for name in ("a.mp4", "sub/b.MOV", "c.png", "notes.md", ".hidden/d.mp4", "._a.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "c.txt").write_text(" A ball.\n")
    clips, _ = list_captionable(tmp_path)
    assert {clip.path.name: clip.caption for clip in clips} == {"a.mp4": "", "b.MOV": "", "c.png": "A ball."}
    store_captions(tmp_path, {key_of(clip): "A fox." for clip in clips if not clip.caption})
    assert {path.name: path.read_text() for path in tmp_path.rglob("*.txt")} == {
        "a.txt": "A fox.\n",
        "b.txt": "A fox.\n",
        "c.txt": " A ball.\n",
    }


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("clips.csv", "file_name,text\n", "no .jsonl table"),
        ("clips.jsonl", "{\n", "clips.jsonl:1 is not JSON"),
        ("clips.jsonl", '{"text": ""}\n', "clips.jsonl:1 has no file_name"),
        ("clips.jsonl", '{"file_name": "a.mp4", "start": "soon"}\n', "clips.jsonl:1 is no clip"),
        ("clips.jsonl", '{"file_name": "a.mp4", "crop": [1, 2]}\n', "clips.jsonl:1 is no clip"),
    ],
)
def test_a_table_that_cannot_be_captioned_is_refused_by_line(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        list_captionable(tmp_path / name)


def test_a_folder_that_reads_its_captions_elsewhere_is_refused(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match=r"metadata\.csv, into which no captions"):
        list_captionable(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        list_captionable(tmp_path / "nowhere")
