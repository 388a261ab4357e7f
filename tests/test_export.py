"""An exported clip reads back as the same frames, whatever it was cut from."""

from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from footage import H264, make_clip, read_numbers
from PIL import Image

from mochi_lora.data import export as room
from mochi_lora.data.clip_plan import Shapes
from mochi_lora.data.decode import read_clip
from mochi_lora.data.export import export_clip
from mochi_lora.data.probe import probe
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import Bucket

BUCKET = Bucket(13, 64, 128)
SHAPES = Shapes((BUCKET,), upscale=True)
CROP = (3, 5, 101, 60)  # odd sizes and corners


def _export(source, folder):
    return export_clip(source, probe(source.path), "ab" * 32, SHAPES, folder)


def _read(path, start=0.0, end=None, crop=None):
    source = ClipSource(path, "x", start, end, crop)
    return read_clip(source, probe(path), BUCKET)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Clips of numbered frames by rate, made once."""
    folder, made = tmp_path_factory.mktemp("films"), {}

    def film(rate):
        if rate not in made:
            made[rate] = make_clip(folder / f"{rate.replace('/', '_')}.mp4", frames=64, rate=rate)
        return made[rate]

    return film


@pytest.mark.parametrize("rate", ["24000/1001", "24", "25", "30000/1001", "30", "60"])
@pytest.mark.parametrize(("start", "end", "crop"), [(0.31, 0.9, None), (0.5, None, CROP), (1 / 3, 1.0, CROP)])
def test_a_range_reads_back_bit_for_bit(films, tmp_path, rate, start, end, crop):
    film = films(rate)
    done = _export(ClipSource(film, "x", start, end, crop), tmp_path)
    expected = _read(film, start, end, crop)
    assert torch.equal(_read(done.path, done.start or 0.0), expected)
    if crop is None:
        assert read_numbers(expected)[0] > 5, "the range was not read at all"


def test_the_file_holds_the_range_and_not_more(films, tmp_path):
    done = _export(ClipSource(films("30"), "x", 0.5, 1.5), tmp_path)
    assert done.start is None
    info = probe(done.path)
    assert (len(info.times), info.width, info.height) == (30, 128, 64)
    assert read_numbers(read_clip(ClipSource(done.path, "x"), info, BUCKET)) == list(range(15, 28))
    with av.open(str(done.path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_a_start_between_two_frames_is_kept_by_the_frame_before(films, tmp_path):
    done = _export(ClipSource(films("25"), "x", 0.31, 0.95), tmp_path)
    assert done.start == pytest.approx(0.03)
    assert read_numbers(_read(done.path))[0] == 7


def test_variable_rates_keep_their_times(tmp_path):
    film = make_clip(
        tmp_path / "film.mkv", frames=60, rate="30", codec=("-vf", "select=not(mod(n\\,3)-1)+gt(n\\,30)", *H264[2:])
    )
    source = ClipSource(film, "x", 0.4, 1.6)
    assert len({round(after - before, 3) for before, after in pairwise(probe(film).times)}) > 1
    done = _export(source, tmp_path / "out")
    assert torch.equal(_read(done.path, done.start or 0.0), _read(film, 0.4, 1.6))


def test_a_whole_file_is_copied_byte_for_byte(films, tmp_path):
    done = _export(ClipSource(films("24"), "x"), tmp_path)
    assert done.path.read_bytes() == films("24").read_bytes()
    assert done.start is None


def test_a_cropped_picture_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    done = export_clip(
        ClipSource(tmp_path / "a.png", "x", crop=(4, 3, 140, 70)),
        probe(tmp_path / "a.png"),
        "00",
        Shapes((Bucket(1, 64, 128),), upscale=False),
        tmp_path / "out",
    )
    assert np.array_equal(np.array(Image.open(done.path)), pixels[3:70, 4:140])


def test_ranges_crops_and_contents_have_names_of_their_own(films, tmp_path):
    clips = [(0.0, 1.0, None), (0.0, 0.9, None), (0.1, 1.0, None), (0.0, 1.0, CROP)]
    names = {_export(ClipSource(films("30"), "x", *clip), tmp_path).path.name for clip in clips}
    assert len(names) == 4
    source = ClipSource(films("30"), "x", 0.0, 1.0)
    other = export_clip(source, probe(source.path), "cd" * 32, SHAPES, tmp_path)
    assert other.path.name not in names


def test_a_second_export_keeps_what_is_there(films, tmp_path, monkeypatch):
    source = ClipSource(films("25"), "x", 0.31, 0.9)
    first = _export(source, tmp_path)

    def decode(*_):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(room, "shown_frames", decode)
    monkeypatch.setattr(room, "read_clip", decode)
    assert _export(source, tmp_path) == first


def test_a_file_that_does_not_read_back_is_not_left_behind(films, tmp_path, monkeypatch):
    frames = room.shown_frames

    def one_bit_off(info, wanted):
        for number, picture in enumerate(frames(info, wanted)):
            spoiled = picture.copy()
            spoiled[0, 0, 0] ^= number == 3
            yield spoiled

    monkeypatch.setattr(room, "shown_frames", one_bit_off)
    with pytest.raises(ClipError, match="other frames would be chosen"):
        _export(ClipSource(films("30"), "x", 0.5, 1.5), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_decord_reads_wrongly_is_not_handed_on(films, tmp_path, monkeypatch):
    """With a key frame on the heels of another, at which no decoder may begin, decord2 3.4.0 shows another frame's picture."""
    monkeypatch.setattr(room, "_LOSSLESS", {"qp": "0", "preset": "veryfast", "bf": "0"})
    film = tmp_path / "cuts.mp4"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("libx264rgb", rate=60, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "rgb24"
        for index in range(42):
            picture = np.full((64, 128, 3), index * 6, np.uint8)
            picture[:, : index * 2] = 255 - index * 6
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(ClipError, match="decord reads other frames"):
        _export(ClipSource(film, "x", 0.05), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_clip_that_training_could_not_use_is_not_exported(films, tmp_path):
    with pytest.raises(ClipError, match="clip too short"):
        _export(ClipSource(films("30"), "x", 2.0, 2.2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
