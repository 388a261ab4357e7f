"""Video files and contact sheets, read back."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mochi_lora.inference import video

HEIGHT, WIDTH = 64, 96


def smooth_frames(count: int) -> np.ndarray:
    """Saturated gradients that move: chroma, where a wrong colour matrix shows, and motion, where a lost frame shows."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    frames = []
    for index in range(count):
        red = 255 * x / WIDTH
        green = 255 * y / HEIGHT
        blue = np.full_like(red, 40 + 160 * index / max(1, count - 1))
        frames.append(np.stack([red, green, blue], axis=-1))
    return np.stack(frames).round().astype(np.uint8)


def read_back(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return float(10 * np.log10(255**2 / error))


def test_an_mp4_holds_every_frame_at_thirty_per_second(tmp_path: Path) -> None:
    frames = smooth_frames(19)
    video.write_mp4(tmp_path / "clip.mp4", frames)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert "mp4" in container.format.name
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.width, stream.height) == (Fraction(30), WIDTH, HEIGHT)
        context = stream.codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([index / 30 for index in range(19)])


def test_colours_survive_and_frames_keep_their_order(tmp_path: Path) -> None:
    frames = smooth_frames(19)
    video.write_mp4(tmp_path / "clip.mp4", frames)
    back = read_back(tmp_path / "clip.mp4")
    assert back.shape == frames.shape
    assert min(psnr(a, b) for a, b in zip(back, frames, strict=True)) > 32
    assert psnr(back[0], frames[-1]) < 20, "frames 0 and 18 are too alike for this test to see a wrong order"


def test_a_single_frame_is_a_clip(tmp_path: Path) -> None:
    video.write_mp4(tmp_path / "image.mp4", smooth_frames(1))
    assert read_back(tmp_path / "image.mp4").shape == (1, HEIGHT, WIDTH, 3)


def test_the_index_stands_before_the_frames(tmp_path: Path) -> None:
    video.write_mp4(tmp_path / "clip.mp4", smooth_frames(7))
    content = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def break_off(temporary: Path, **_frames: object) -> None:
        temporary.write_bytes(b"half")
        raise OSError("encoder broke")

    monkeypatch.setattr(video, "_encode", break_off)
    with pytest.raises(OSError, match="encoder broke"):
        video.write_mp4(path, smooth_frames(1))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_odd_sizes_and_floats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="even"):
        video.write_mp4(tmp_path / "clip.mp4", smooth_frames(1)[:, :63])
    with pytest.raises(AssertionError, match="uint8"):
        video.write_mp4(tmp_path / "clip.mp4", smooth_frames(1) / 255)
    assert list(tmp_path.iterdir()) == []


def test_pixels_map_to_bytes_by_rounding_and_clamping() -> None:
    levels = torch.arange(256) / 127.5 - 1
    assert video.to_uint8(levels.expand(3, 1, 1, 256))[0, 0, :, 0].tolist() == list(range(256))
    beyond = torch.tensor([-1.5, 1.5]).expand(3, 1, 1, 2)
    assert video.to_uint8(beyond)[0, 0, :, 0].tolist() == [0, 255]


def test_pixels_keep_their_axes() -> None:
    pixels = torch.full((3, 2, 4, 5), -1.0)
    pixels[0, 1, 2, 3] = 1  # red, second frame, third row, fourth column
    frames = video.to_uint8(pixels)
    assert frames.shape == (2, 4, 5, 3)
    assert np.argwhere(frames == 255).tolist() == [[1, 2, 3, 0]]


def columns_of_colour(sheet: np.ndarray, row: slice) -> int:
    """How many separate runs of columns in `row` are not white."""
    inked = (sheet[row] < 250).any(axis=(0, 2)).astype(int)
    return int((np.diff(np.concatenate([[0], inked])) == 1).sum())


def test_a_contact_sheet_shows_evenly_spaced_frames_with_first_and_last(tmp_path: Path) -> None:
    frames = np.stack([np.full((48, 96, 3), 10 * index, np.uint8) for index in range(13)])
    video.write_contact_sheet(tmp_path / "sheet.png", [("a lighthouse", frames)], columns=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 4 * (320 + 12) + 12
    middle = sheet[-80]
    assert [int(middle[12 + column * 332 + 160, 0]) for column in range(4)] == [0, 40, 80, 120]


def test_a_clip_shorter_than_the_columns_shows_each_frame_once(tmp_path: Path) -> None:
    frames = np.zeros((2, 48, 96, 3), np.uint8)
    video.write_contact_sheet(tmp_path / "sheet.png", [("two", frames)], columns=6)
    assert columns_of_colour(np.asarray(Image.open(tmp_path / "sheet.png")), slice(-80, -70)) == 2


def test_long_titles_wrap_inside_the_sheet_and_rows_of_other_sizes_fit(tmp_path: Path) -> None:
    long = "W" * 700 + " and a very long prompt about waves " * 20
    rows = [("short", np.zeros((1, 48, 96, 3), np.uint8)), (long, np.zeros((3, 96, 48, 3), np.uint8))]
    video.write_contact_sheet(tmp_path / "both.png", rows, columns=2)
    both = np.asarray(Image.open(tmp_path / "both.png"))
    video.write_contact_sheet(tmp_path / "one.png", rows[:1], columns=2)
    one = np.asarray(Image.open(tmp_path / "one.png"))
    assert both.shape[1] == one.shape[1]
    assert (both[: len(one)] == one).all()
    assert len(both) > len(one) + 640 + 10 * 20, "the long title takes many lines above a frame of 640 rows"
    assert (both[:, -6:] == 255).all(), "nothing is cut off at the right edge"


def test_an_empty_title_is_allowed(tmp_path: Path) -> None:
    video.write_contact_sheet(tmp_path / "sheet.png", [("", np.zeros((1, 48, 96, 3), np.uint8))])
    assert (tmp_path / "sheet.png").stat().st_size > 0
