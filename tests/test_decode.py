"""The right frames, proven by the numbers burnt into them, from every container and at every rate."""

import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from footage import H264, make_clip, numbered_frame, read_numbers, run_ffmpeg
from PIL import Image
from scenes import scene, write

from mochi_lora.data import decode as room
from mochi_lora.data.decode import read_clip
from mochi_lora.data.probe import ClipInfo, mark_of, probe
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import Bucket

BUCKET = Bucket(37, 64, 128)
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "400k")
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2")


def _numbers(path: Path, bucket: Bucket = BUCKET, *, start: float = 0.0, end: float | None = None) -> list[int]:
    clip = read_clip(ClipSource(path, "numbers", start, end), probe(path), bucket)
    assert clip.shape == (3, bucket.frames, bucket.height, bucket.width)
    assert clip.dtype == torch.float32
    assert clip.abs().max() <= 1
    return read_numbers(clip)


def _exact(rate: str, count: int, frames: int = 37) -> list[int]:
    return [min(range(count), key=lambda i: (abs(i / Fraction(rate) - Fraction(k, 30)), i)) for k in range(frames)]


@pytest.mark.parametrize("rate", ["24", "25", "30000/1001", "30", "50", "60"])
def test_every_rate_gives_exactly_the_nearest_frames(tmp_path, rate):
    frames = int(Fraction(rate) * 3 / 2)
    clip = make_clip(tmp_path / "a.mp4", frames=frames, rate=rate)
    assert _numbers(clip) == _exact(rate, frames)


def test_key_frames_on_each_others_heels_do_not_shift_frames(tmp_path):
    """x264 marks scene cuts just after a key frame as key frames, though no decoder may begin there."""
    path = tmp_path / "cuts.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=60, options={"qp": "10", "preset": "veryfast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for index in range(42):
            picture = np.full((64, 128, 3), index * 6, np.uint8)
            picture[:, : index * 2] = 255 - index * 6
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        keys = [index for index, packet in enumerate(container.demux(video=0)) if packet.size and packet.is_keyframe]
    assert 1 < len(keys) < 42
    with av.open(str(path)) as container:
        exact = [frame.to_ndarray(format="rgb24").mean() / 127.5 - 1 for frame in container.decode(video=0)]
    for start in (0, 5):  # in frames; a jump into the middle must not begin at such a frame either
        found = read_clip(ClipSource(path, "cuts", start / 60), probe(path), Bucket(13, 64, 128)).mean((0, 2, 3))
        assert torch.allclose(found, torch.tensor(exact[start::2][:13], dtype=torch.float32), atol=0.01), start


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mov", H264),
        ("a.mkv", H264),
        ("a.webm", VP9),
        ("a.avi", ("-c:v", "mpeg4", "-q:v", "2")),
        ("a.gif", ()),
        ("a.mpg", MPEG2),
        ("a.vob", (*MPEG2, "-f", "vob")),
        ("a.ts", H264),
        ("b.ts", MPEG2),
        ("a.ogv", ("-c:v", "libtheora", "-q:v", "7")),
        ("a.m2ts", (*H264, "-f", "mpegts", "-mpegts_m2ts_mode", "1")),
    ],
)
def test_every_container_gives_exactly_the_frames_asked_for(tmp_path, name, codec):
    clip = make_clip(tmp_path / name, frames=90, rate="25", codec=codec)
    assert _numbers(clip) == _exact("25", 90)
    assert _numbers(clip, start=1.2) == [30 + index for index in _exact("25", 60)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_rate_follows_the_time_stamps(tmp_path, name):
    """Two of three frames kept, their times with them: each output shows the frame on screen nearest to its instant."""
    clip = make_clip(tmp_path / name, frames=90, codec=(*H264, "-vf", "select='mod(n,3)'", "-fps_mode", "vfr"))
    kept = [number for number in range(90) if number % 3]
    expected = [min(kept, key=lambda number: (abs(number - kept[0] - k), number)) for k in range(37)]
    assert _numbers(clip) == expected


@pytest.mark.parametrize(
    "codec",
    [
        H264,
        (*H264, "-x264-params", "open-gop=1:keyint=15:bframes=3"),
        (*H264, "-x264-params", "intra-refresh=1:keyint=15"),  # one key frame, at the beginning
        ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:open-gop=1:keyint=12:bframes=4"),
        VP9,
    ],
)
def test_a_jump_to_a_key_frame_gives_the_very_pictures_of_decoding_from_the_beginning(tmp_path, codec):
    clip = make_clip(tmp_path / "a.mkv", frames=120, codec=codec)
    info = probe(clip)
    assert info.seekable
    for start in (0.1, 0.5, 1.37, 2.7):
        source = ClipSource(clip, "numbers", start)
        jumped = read_clip(source, info, Bucket(25, 64, 128))
        assert torch.equal(jumped, read_clip(source, replace(info, seekable=False), Bucket(25, 64, 128)))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.ts", H264),
        ("b.ts", (*H264, "-x264-params", "open-gop=1:keyint=25:bframes=3")),
        ("c.ts", (*H264, "-x264-params", "intra-refresh=1:keyint=15")),
        ("a.mpg", MPEG2),
        ("a.avi", ("-c:v", "mpeg4", "-q:v", "2", "-bf", "2")),
        ("a.ogv", ("-c:v", "libtheora", "-q:v", "7")),
    ],
)
def test_a_jump_into_a_container_without_an_index_gives_the_frames_of_decoding_from_the_beginning(
    tmp_path, monkeypatch, name, codec
):
    """Some frames of such streams have no stamp, and a jump lands anywhere: what the probe saw decides which frame is which."""
    clip = make_clip(tmp_path / name, frames=250, rate="25", codec=codec)
    info, looked_at = probe(clip), []
    monkeypatch.setattr(room, "mark_of", lambda frame: looked_at.append(frame.pts) or mark_of(frame))
    for first in (60, 119, 203):
        wanted = range(first, first + 12)
        found = list(room.shown_frames(info, wanted))
        assert np.array_equal(found, list(room.shown_frames(replace(info, seekable=False), wanted)))
    assert 0 < len(looked_at) < 300  # 382 frames lie before the three clips
    looked_at.clear()
    others = replace(info, marks=info.marks[1:] + info.marks[:1])  # as if stamps were a frame off after every jump
    assert np.array_equal(list(room.shown_frames(others, wanted)), found)
    assert looked_at


def test_a_range_shows_only_frames_inside_it(tmp_path):
    clip = make_clip(tmp_path / "a.mp4", frames=90)
    assert _numbers(clip, start=1.0, end=2.3) == list(range(30, 67))
    with pytest.raises(ClipError, match=r"clip too short: has 1\.200 s"):
        _numbers(clip, start=1.0, end=2.2)


@pytest.mark.parametrize("turn", ["90", "180", "-90"])
def test_rotation_is_applied(tmp_path, turn):
    """Coded turned the other way round, so that only a rotation applied once, in the right sense, is readable."""
    undo = {"90": "transpose=clock", "180": "hflip,vflip", "-90": "transpose=cclock"}[turn]
    make_clip(tmp_path / "a.mp4", codec=(*H264, "-vf", undo))
    run_ffmpeg("-display_rotation", turn, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mov")
    assert _numbers(tmp_path / "b.mov") == list(range(37))


def test_frames_hidden_by_an_edit_list_stay_hidden(tmp_path):
    make_clip(tmp_path / "whole.mp4", frames=60)
    run_ffmpeg("-ss", "0.5", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "cut.mp4")
    assert _numbers(tmp_path / "cut.mp4") == list(range(15, 52))


def test_a_file_that_starts_late_is_read_from_its_first_frame(tmp_path):
    make_clip(tmp_path / "a.mp4")
    run_ffmpeg("-itsoffset", "5", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "late.mkv")
    assert probe(tmp_path / "late.mkv").origin == pytest.approx(5, abs=0.1)
    assert _numbers(tmp_path / "late.mkv") == list(range(37))


def test_a_clip_that_is_one_picture_throughout_is_refused(tmp_path):
    clip = make_clip(tmp_path / "a.mp4", last_number=0, codec=("-c:v", "libx264rgb", "-qp", "0"))
    with pytest.raises(ClipError, match=r"a\.mp4: all 37 frames of it are identical: nothing to learn"):
        _numbers(clip)


DRAWN = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "medium", "-crf", "23")


@pytest.mark.parametrize("rate", ["24", "60"])
def test_a_figure_that_comes_to_rest_is_used_with_its_hold(tmp_path, rate):
    """What x264 makes of a hold: frames that differ in no bit."""
    moving = scene(1, 8, size=(128, 64))
    film = np.concatenate([moving, np.repeat(moving[-1:], 70, 0)])
    clip = write(tmp_path / "a.mp4", film, rate=rate, codec=DRAWN)
    frames = read_clip(ClipSource(clip, "x"), probe(clip), BUCKET)
    held = [bool(torch.equal(one, other)) for one, other in pairwise(frames.unbind(1))]
    assert all(held[-8:])
    assert not all(held)


SPOILERS = {
    "zeros": lambda packet, chance: bytes(len(packet)),
    "zeros behind the head": lambda packet, chance: packet[:16] + bytes(len(packet[16:])),
    "noise": lambda packet, chance: chance.bytes(len(packet)),
    "noise in the second half": lambda packet, chance: (
        packet[: len(packet) // 2] + chance.bytes(len(packet[len(packet) // 2 :]))
    ),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_an_ending_whose_packets_are_spoiled_is_refused_and_never_a_repetition(tmp_path, name, spoil):
    """The last twelve frames of moving footage, in a file of full length. Without their heads, Matroska has fewer frames."""
    clip = write(tmp_path / name, scene(1, 40, size=(128, 64)), rate="30", codec=DRAWN)
    chance = np.random.default_rng(3)
    with av.open(str(clip)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(clip.read_bytes())
    for start, size in packets[-12:]:
        content[start : start + size] = spoil(bytes(content[start : start + size]), chance)
    clip.write_bytes(content)
    with pytest.raises(ClipError, match=rf"{name}|clip too short: has 0\.9"):
        read_clip(ClipSource(clip, "x", start=0.05), probe(clip), BUCKET)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("kept", [0.6, 0.8, 0.95])
def test_a_cut_off_ending_of_drawn_footage_is_refused(tmp_path, name, kept):
    moving = scene(1, 30, size=(128, 64))
    clip = write(tmp_path / name, np.concatenate([moving, np.repeat(moving[-1:], 10, 0)]), rate="30", codec=DRAWN)
    content = clip.read_bytes()
    clip.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ClipError, match=name):
        read_clip(ClipSource(clip, "x"), probe(clip), BUCKET)


def test_a_short_stillness_and_repeats_from_rate_conversion_are_no_frozen_ending(tmp_path):
    lossless = ("-c:v", "libx264rgb", "-qp", "0")
    assert _numbers(make_clip(tmp_path / "a.mp4", frames=37, last_number=30, codec=lossless))[-7:] == [30] * 7
    slow = make_clip(tmp_path / "b.mp4", frames=5, rate="3", codec=lossless)  # each frame shown ten times
    assert _numbers(slow) == _exact("3", 5)


def test_the_crop_is_centred_and_the_picture_not_stretched(tmp_path):
    """64x128 into a square: the middle 64 columns, bits 2 to 5 of the number, fill the width."""
    clip = make_clip(tmp_path / "a.mp4", frames=40)
    square = read_clip(ClipSource(clip, "numbers"), probe(clip), Bucket(37, 64, 64))
    whole = read_clip(ClipSource(clip, "numbers"), probe(clip), BUCKET)
    torch.testing.assert_close(square, whole[..., 32:96])


@pytest.mark.parametrize(("name", "start"), [("a.mp4", 0.0), ("a.mkv", 0.0), ("a.mp4", 0.6)])
def test_a_picture_made_up_for_damaged_data_is_refused(tmp_path, name, start):
    """Forty bytes overwritten inside one packet of the second group of pictures: ffmpeg reads on without error."""
    clip = make_clip(tmp_path / name, frames=90, codec=("-vf", "noise=alls=60:allf=t", *H264))
    with av.open(str(clip)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = packets[17]
    content = bytearray(clip.read_bytes())
    content[position + size // 2 : position + size // 2 + 40] = bytes(range(40))
    clip.write_bytes(content)
    source = ClipSource(clip, "noise", start)
    with pytest.raises(ClipError, match=rf"{name}: damaged at 0\.[56]\d\d s; copy it again"):
        read_clip(source, probe(clip), BUCKET)
    assert read_clip(replace(source, start=1.0), probe(clip), BUCKET).isfinite().all()  # a later range is whole


def test_a_file_cut_after_it_was_probed_is_refused(tmp_path):
    """moov first, so that it opens: no short or repeated ending may come out."""
    clip = make_clip(tmp_path / "a.mp4", frames=90, codec=(*H264, "-movflags", "+faststart"))
    info = probe(clip)
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    source = ClipSource(clip, "numbers", start=1.7)
    with pytest.raises(ClipError, match=r"a\.mp4: "):
        read_clip(source, info, BUCKET)


def test_a_file_exchanged_after_it_was_probed_is_refused(tmp_path):
    """Indices into the old file's frames would show other moments of the new one."""
    info = probe(make_clip(tmp_path / "a.mp4", rate="30"))
    make_clip(tmp_path / "a.mp4", rate="24")
    with pytest.raises(ClipError, match=r"a\.mp4: frame 1 at 0\.033 s cannot be decoded"):
        read_clip(ClipSource(info.path, "numbers"), info, BUCKET)


def test_a_concealed_frame_is_never_handed_out(tmp_path):
    """The stream ends inside frame N, which the decoder fills up; a clip that ends with frame N must not contain it."""
    clip = make_clip(tmp_path / "a.ts", codec=("-vf", "noise=alls=60:allf=t", *H264))
    info, content = probe(clip), clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2 // 188 * 188])
    with pytest.raises(ClipError, match="is damaged") as refusal:
        probe(clip)
    damaged = int(re.search(r"frame (\d+) is damaged", str(refusal.value))[1])
    with pytest.raises(ClipError, match=rf"damaged at {damaged / 30:.3f} s"):
        read_clip(ClipSource(clip, "noise", start=(damaged - 6) / 30), info, Bucket(7, 64, 128))


def test_an_image_is_read_upright_with_transparency_over_black(tmp_path):
    picture = Image.fromarray(numbered_frame(77))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    picture.rotate(180).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert _numbers(tmp_path / "a.jpg", Bucket(1, 64, 128)) == [77]
    clear = np.dstack([np.full((64, 128, 3), 255, np.uint8), np.zeros((64, 128), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "b.png")
    info: ClipInfo = probe(tmp_path / "b.png")
    assert (read_clip(ClipSource(info.path, "clear"), info, Bucket(1, 64, 128)) == -1).all()
