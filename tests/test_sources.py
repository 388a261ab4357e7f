"""What counts as a clip and what a bad caption or table says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mochi_lora.data.sources import ClipSource, list_sources
from mochi_lora.errors import UserError


def _clip(path: Path, caption: str | bytes | None = "a clip") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not looked into")
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def test_a_folder_is_searched_recursively_and_sorted(tmp_path):
    later = _clip(tmp_path / "b.MP4", "  second\n")
    deeper = _clip(tmp_path / "a" / "z.webm", "first")
    image = _clip(tmp_path / "c.png", "third")
    (tmp_path / "notes.md").write_text("no media")
    sources, rejections = list_sources(tmp_path)
    assert sources == [ClipSource(deeper, "first"), ClipSource(later, "second"), ClipSource(image, "third")]
    assert rejections == []


def test_hidden_files_are_no_clips(tmp_path):
    kept = _clip(tmp_path / "a.mp4")
    _clip(tmp_path / "._a.mp4")
    _clip(tmp_path / ".extracted" / "b.mp4")
    assert [source.path for source in list_sources(tmp_path)[0]] == [kept]


def test_two_media_of_one_stem_share_their_caption(tmp_path):
    _clip(tmp_path / "a.mp4", None)
    _clip(tmp_path / "a.png", "both")
    assert [source.caption for source in list_sources(tmp_path)[0]] == ["both", "both"]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [(None, "no caption: write one into"), (" \n", "is empty"), ("schön".encode("latin-1"), "not UTF-8 (byte 3)")],
)
def test_a_bad_caption_rejects_only_its_clip_and_names_both_files(tmp_path, caption, reason):
    good = _clip(tmp_path / "good.mp4")
    bad = _clip(tmp_path / "bad.mp4", caption)
    sources, (rejection,) = list_sources(tmp_path)
    assert [source.path for source in sources] == [good]
    assert rejection.name == str(bad)
    assert reason in rejection.reason
    assert str(tmp_path / "bad.txt") in rejection.reason


def test_a_byte_order_mark_is_not_part_of_the_caption(tmp_path):
    _clip(tmp_path / "a.mp4", b"\xef\xbb\xbfa clip")
    assert list_sources(tmp_path)[0][0].caption == "a clip"


def test_a_missing_folder_and_one_without_media_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; expected a folder"):
        list_sources(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no media")
    with pytest.raises(UserError, match="no clips in"):
        list_sources(tmp_path)
    with pytest.raises(UserError, match=r"neither a \.csv nor a \.jsonl"):
        list_sources(tmp_path / "notes.txt")


def _csv(folder: Path, text: str) -> Path:
    (folder / "table.csv").write_text(text, encoding="utf-8")
    return folder / "table.csv"


def test_a_csv_names_clips_relative_to_itself_with_ranges(tmp_path):
    clip = _clip(tmp_path / "clips" / "a.mp4", None)
    table = _csv(tmp_path, 'file_name,text,start,end,extra\nclips/a.mp4,"one, two",1.5,3,x\nclips/a.mp4,whole,,,\n')
    sources, rejections = list_sources(table)
    assert sources == [ClipSource(clip, "whole"), ClipSource(clip, "one, two", 1.5, 3.0)]
    assert sources[1].name == f"{clip}@1.5s"
    assert sources[0].name == str(clip)
    assert rejections == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("gone.mp4,text,,", "no such file"),
        ("a.mp4,,,", "caption is empty"),
        (",text,,", "file_name is empty"),
        ("a.doc,text,,", "not a video or image"),
        ("a.mp4,text,soon,", "start 'soon': write seconds"),
        ("a.mp4,text,nan,", "start 'nan': write seconds"),
        ("a.mp4,text,3,2", "expected 0 <= start < end"),
        ("a.mp4,text,-1,", "expected 0 <= start < end"),
        ("a.png,text,1,2", "an image has no start"),
        ("a.mp4", "caption is empty"),
    ],
)
def test_a_bad_row_is_rejected_by_its_line(tmp_path, row, reason):
    for name in ("a.mp4", "a.png"):
        _clip(tmp_path / name, None)
    sources, (rejection,) = list_sources(_csv(tmp_path, f"file_name,text,start,end\na.mp4,good,,\n{row}\n"))
    assert [source.caption for source in sources] == ["good"]
    assert "table.csv:3" in rejection.name
    assert reason in rejection.reason


@pytest.mark.parametrize("cell", ['"[8, 0, 120, 64]"', "8 0 120 64", '"8,0,120,64"', "[8 0 120 64]"])
def test_a_crop_is_read_in_any_usual_spelling(tmp_path, cell):
    _clip(tmp_path / "a.mp4", None)
    _clip(tmp_path / "a.png", None)
    table = _csv(tmp_path, f"file_name,text,crop\na.mp4,one,{cell}\na.png,two,{cell}\na.mp4,three,\n")
    assert [(source.caption, source.crop) for source in list_sources(table)[0]] == [
        ("one", (8, 0, 120, 64)),
        ("three", None),
        ("two", (8, 0, 120, 64)),
    ]


def test_a_crop_may_be_a_list_in_jsonl(tmp_path):
    _clip(tmp_path / "a.mp4", None)
    rows = [
        {"file_name": "a.mp4", "text": text, "crop": crop} for text, crop in (("x", [0, 8, 16, 24]), ("y", None), ("z", []))
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert {source.caption: source.crop for source in list_sources(tmp_path / "t.jsonl")[0]} == {
        "x": (0, 8, 16, 24),
        "y": None,
        "z": None,
    }


@pytest.mark.parametrize(
    "crop",
    ["[1, 2, 3]", "[0, 0, 0, 8]", "[0, 9, 8, 8]", "[-1, 0, 8, 8]", "all", "[0, 0, 8.5, 8]", [0, 0, 8.5, 8], [0, 0, True, 1], 7],
)
def test_a_crop_that_is_none_is_refused_by_its_line(tmp_path, crop):
    _clip(tmp_path / "a.mp4", None)
    rows = [{"file_name": "a.mp4", "text": "x", "crop": crop}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sources, (rejection,) = list_sources(tmp_path / "t.jsonl")
    assert sources == []
    assert "t.jsonl:1" in rejection.name
    assert "expected [left, top, right, bottom] in pixels" in rejection.reason


@pytest.mark.parametrize(
    ("cell", "video"),
    [
        ("films/long.MKV", "films/long.MKV"),
        (f" {'ab' * 32} ", "ab" * 32),
        ("pexels", None),
        ("", None),
        (None, None),
        (3, None),
    ],
)
def test_the_column_source_counts_where_it_names_a_video(tmp_path, cell, video):
    """`source: pexels` on every row would make one video of the whole data set, and hold nothing out."""
    _clip(tmp_path / "a.mp4", None)
    (tmp_path / "t.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": "x", "source": cell}))
    ((source,), _) = list_sources(tmp_path / "t.jsonl")
    assert source.video == video


def test_missing_columns_are_named_with_those_found(tmp_path):
    with pytest.raises(UserError, match=r"no column file_name and text; found: caption, video\."):
        list_sources(_csv(tmp_path, "video,caption\na.mp4,x\n"))
    (tmp_path / "t.jsonl").write_text('{"file_name": "a.mp4", "caption": "x"}\n')
    with pytest.raises(UserError, match=r"no column text; found: caption, file_name\."):
        list_sources(tmp_path / "t.jsonl")
    (tmp_path / "t.csv").write_bytes("file_name,text\na.mp4,sch\xf6n\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"t\.csv is not UTF-8"):
        list_sources(tmp_path / "t.csv")


def test_a_torn_jsonl_line_is_rejected_by_its_number(tmp_path):
    clip = _clip(tmp_path / "a.mp4", None)
    good = json.dumps({"file_name": "a.mp4", "text": "ein Hügel", "start": 1, "end": None})
    (tmp_path / "t.jsonl").write_text(f'{good}\n\n{{"file_name": \n[1]\n', encoding="utf-8")
    sources, rejections = list_sources(tmp_path / "t.jsonl")
    assert sources == [ClipSource(clip, "ein Hügel", 1.0)]
    assert [rejection.name.rsplit(":", 1)[1] for rejection in rejections] == ["3", "4"]


def test_a_folder_with_metadata_is_read_as_its_table(tmp_path):
    clip = _clip(tmp_path / "a.mp4", "beside it, not used")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "from the table"}\n')
    assert list_sources(tmp_path)[0] == [ClipSource(clip, "from the table")]


# In a process of its own: datasets opens a cache that the other tests have no use for.
_SAVE = """
import sys, datasets
folder, clip = sys.argv[1:]
features = datasets.Features({"video": datasets.Video(), "text": datasets.Value("string")})
cells = [{"path": clip, "bytes": None}, {"path": "in/archive.mkv", "bytes": b"embedded"}, None]
dataset = datasets.Dataset.from_dict({"video": cells, "text": ["by path", "by bytes", "none"]}, features=features)
dataset.save_to_disk(folder + "/saved")
datasets.DatasetDict(train=dataset).save_to_disk(folder + "/splits")
dataset.rename_column("text", "caption").save_to_disk(folder + "/columns")
datasets.Dataset.from_dict({"file_name": [clip], "text": ["by name"], "start": [1.5]}).save_to_disk(folder + "/names")
for shard in range(2):
    dataset.select([1 + shard]).to_parquet(f"{folder}/pushed/data/train-0000{shard}-of-00002.parquet")
"""


@pytest.fixture(scope="module")
def datasets_made(tmp_path_factory):
    """Folder of a.mp4 and the datasets saved, splits, columns and names."""
    folder = tmp_path_factory.mktemp("datasets")
    clip = _clip(folder / "a.mp4", None)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    subprocess.run([sys.executable, "-c", _SAVE, str(folder), str(clip)], check=True, env=environment, capture_output=True)
    return folder


@pytest.fixture
def saved(datasets_made, tmp_path):
    return shutil.copytree(datasets_made / "saved", tmp_path / "saved")


def test_a_saved_datasets_folder_is_read_without_decoding_and_extracted_once(datasets_made, saved):
    clip = datasets_made / "a.mp4"
    sources, (rejection,) = list_sources(saved)
    by_caption = {source.caption: source.path for source in sources}
    assert by_caption.keys() == {"by path", "by bytes"}
    extracted = by_caption["by bytes"]
    assert extracted.parent == saved / ".extracted"
    assert extracted.suffix == ".mkv"
    assert extracted.read_bytes() == b"embedded"
    assert by_caption["by path"].read_bytes() == clip.read_bytes()  # save_to_disk embeds files
    assert rejection.name.endswith("row 2")
    written = extracted.stat().st_mtime_ns
    assert list_sources(saved)[0] == sources
    assert extracted.stat().st_mtime_ns == written
    assert list_sources(datasets_made / "names") == ([ClipSource(clip, "by name", 1.5)], [])
    with pytest.raises(UserError, match=r"holds several splits \(train\)"):
        list_sources(datasets_made / "splits")
    with pytest.raises(UserError, match=r"expected a column text .* found: video .*caption"):
        list_sources(datasets_made / "columns")


def test_parquet_as_push_to_hub_leaves_it_is_read_whole(datasets_made, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = shutil.copytree(datasets_made / "pushed", tmp_path / "pushed")
    ((clip,), (rejection,)) = list_sources(folder)
    assert (clip.caption, clip.path.read_bytes(), clip.path.parent) == ("by bytes", b"embedded", folder / ".extracted")
    assert rejection.name.endswith("row 1")
    first = folder / "data" / "train-00000-of-00002.parquet"
    assert [source.caption for source in list_sources(first)[0]] == ["by bytes"]
    shutil.copy(first, first.with_name("test-00000-of-00001.parquet"))
    with pytest.raises(
        UserError, match=r"several splits \(test, train\) as parquet; name the file of one, such as .*test-00000"
    ):
        list_sources(folder)
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged or incomplete Hugging Face dataset"):
        list_sources(first)


def test_a_table_one_level_down_is_found_where_nothing_else_is(tmp_path):
    (tmp_path / "train").mkdir()
    clip = _clip(tmp_path / "train" / "a.mp4", None)
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "from below"}\n')
    assert list_sources(tmp_path) == ([ClipSource(clip, "from below")], [])
    shutil.copytree(tmp_path / "train", tmp_path / "validation")
    with pytest.raises(
        UserError, match=r"several tables \(train/metadata.jsonl, validation/metadata.jsonl\); name one of them"
    ):
        list_sources(tmp_path)
    other = _clip(tmp_path / "b.mp4", "beside it")
    assert list_sources(tmp_path)[0] == [ClipSource(other, "beside it")]


def test_rows_of_a_saved_dataset_keep_no_media_in_memory(saved):
    from mochi_lora.data.hub_folder import rows_of_saved_dataset

    rows, _ = rows_of_saved_dataset(saved)
    assert [row["text"] for _, row in rows] == ["by path", "by bytes"]
    assert all(row.keys() == {"text", "file_name"} and isinstance(row["file_name"], str) for _, row in rows)


def test_media_that_cannot_be_extracted_are_told_with_the_dataset(saved):
    (saved / ".extracted").write_text("in the way")  # as root, permissions stop nothing
    with pytest.raises(UserError, match=r"saved: its embedded media cannot be written to .*\.extracted .*copy the dataset"):
        list_sources(saved)


@pytest.mark.parametrize("damage", ["no arrow", "half an arrow", "half a state", "no files named"])
def test_a_damaged_saved_dataset_is_refused_by_name(saved, damage):
    arrow, state = next(saved.glob("*.arrow")), saved / "state.json"
    match damage:
        case "no arrow":
            arrow.unlink()
        case "half an arrow":
            arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
        case "half a state":
            state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
        case "no files named":
            state.write_text("{}")
    with pytest.raises(UserError, match=f"data.clips: {saved}: damaged or incomplete Hugging Face dataset .* again"):
        list_sources(saved)
