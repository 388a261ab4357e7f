"""What is seen is what a person would see: whole lines, round circles, upright; the same through every reader."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from footage import H264, from_gray, hdr, make_clip, make_disc, make_interlaced, make_patches, read_numbers, run_ffmpeg

from mochi_lora.data.decode import read_clip
from mochi_lora.data.geometry import choose_bucket
from mochi_lora.data.probe import open_video, probe
from mochi_lora.data.shown import as_shown, progressive
from mochi_lora.data.sources import ClipSource
from mochi_lora.data.tone_map import pq_signal
from mochi_lora.errors import ClipError
from mochi_lora.inference.playback import read_video
from mochi_lora.spec import Bucket

BUCKET = Bucket(37, 64, 128)
MPEG2 = ("-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-q:v", "2", "-bf", "2")


def _woven(order: str) -> tuple[str, ...]:
    return (*H264, "-x264-params", f"{order}=1")


def _fields(clip: torch.Tensor) -> list[int]:
    return [from_gray(code) for code in read_numbers(clip)]


def _diameters(picture: np.ndarray) -> tuple[int, int]:
    """Width and height of what is bright."""
    bright = picture[..., 0] > 127
    return int(bright.any(0).sum()), int(bright.any(1).sum())


@pytest.mark.parametrize("order", ["tff", "bff"])
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", None), ("a.mkv", None), ("a.ts", None), ("a.mpg", MPEG2), ("b.ts", MPEG2)]
)
def test_each_frame_of_interlaced_footage_shows_the_instant_of_its_first_field(tmp_path, order, name, codec):
    """The other field order would give odd numbers, weaving the two fields none at all."""
    clip = make_interlaced(tmp_path / name, order, codec or _woven(order), frames=60)
    info = probe(clip)
    assert _fields(read_clip(ClipSource(clip, "fields"), info, BUCKET)) == list(range(0, 74, 2))
    late = read_clip(ClipSource(clip, "fields", start=0.7), info, BUCKET)
    assert _fields(late) == list(range(42, 116, 2))
    assert torch.equal(late, read_clip(ClipSource(clip, "fields", start=0.7), replace(info, seekable=False), BUCKET))


def test_nothing_of_the_other_field_is_left(tmp_path):
    """Rows of a block are of one brightness; combed, neighbours would differ by 255."""
    clip = make_interlaced(tmp_path / "a.mp4", "tff", _woven("tff"))
    films = read_video(clip).frames[2:40, 2:30, 4::16].astype(int)  # through the reader of whole videos
    assert np.abs(np.diff(films, axis=1)).max() < 40


def test_interlacing_that_begins_late_is_met_all_the_same(tmp_path):
    """Thirty progressive frames, then woven ones: the probe of a .mp4 looks at the beginning only."""
    make_interlaced(tmp_path / "woven.mp4", "tff", _woven("tff"), frames=45)
    make_clip(tmp_path / "whole.mp4", frames=30, codec=(*H264, "-x264-params", "fake-interlaced=1"))
    both = tmp_path / "list.txt"
    both.write_text("file whole.mp4\nfile woven.mp4\n")
    run_ffmpeg("-f", "concat", "-i", both, "-c", "copy", tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert not info.interlaced
    assert _fields(read_clip(ClipSource(info.path, "fields", start=1.0), info, BUCKET)) == list(range(0, 74, 2))


@pytest.mark.parametrize(
    ("aspect", "turn", "size"),
    [
        ("4/3", "0", (240, 120)),
        ("2/3", "0", (180, 180)),
        ("4/3", "90", (120, 240)),
        ("4/3", "180", (240, 120)),
        ("1/2", "-90", (240, 180)),
    ],
)
def test_a_circle_stays_a_circle(tmp_path, aspect, turn, size):
    """Drawn so that it is round only where pixels have their aspect, then turned by the tag."""
    make_disc(tmp_path / "a.mp4", 180, 120, (*H264, "-vf", f"setsar={aspect}"), stretch=1 / float(Fraction(aspect)))
    run_ffmpeg("-display_rotation", turn, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mov")
    info = probe(tmp_path / "b.mov")
    assert (info.width, info.height) == size
    across, down = _diameters(read_video(info.path).frames[3])
    assert abs(across - down) <= 2
    bucket = Bucket(7, 96, 96)
    clip = read_clip(ClipSource(info.path, "disc"), info, bucket)
    across, down = _diameters(clip[:, 3].permute(1, 2, 0).numpy() * 127.5 + 127.5)
    assert abs(across - down) <= 2
    assert down == pytest.approx(96 * (120 * max(1, 1 / float(Fraction(aspect)))) / 2 / min(size), abs=2)


def test_pixel_aspect_interlacing_and_hdr_come_together(tmp_path):
    """PAL widescreen is anamorphic and interlaced at once."""
    codec = (*_woven("tff"), "-aspect", "32:9")
    info = probe(make_interlaced(tmp_path / "a.mp4", "tff", codec))
    assert (info.width, info.height, info.interlaced) == (228, 64, True)
    assert _fields(read_clip(ClipSource(info.path, "fields"), info, Bucket(37, 64, 224)))[:5] == [0, 2, 4, 6, 8]
    signals = np.repeat(pq_signal(np.array([[5.0], [203.0]])), 3, 1)
    wide = make_patches(tmp_path / "b.mp4", signals, hdr("smpte2084", "hdr10=1:sar=4"))
    info = probe(wide)
    assert (info.light.transfer, info.stored, info.width) == ("PQ", (128, 64), 186)  # 16:11
    clip = read_clip(ClipSource(wide, "patches"), info, Bucket(7, 64, 128))
    assert (((clip[:, 3, 32, 96] + 1) * 127.5).round() - 230).abs().max() <= 2


@pytest.mark.parametrize(("width", "height"), [(131, 67), (130, 67), (131, 66)])
def test_odd_sizes_are_read_whole(tmp_path, width, height):
    codec = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-crf", "10", "-b:v", "0", "-pix_fmt", "yuv420p")
    info = probe(make_disc(tmp_path / "a.mkv", width, height, codec))
    assert (info.width, info.height) == (width, height)
    clip = read_clip(ClipSource(info.path, "disc"), info, Bucket(7, 64, 64))
    across, down = _diameters(clip[:, 3].permute(1, 2, 0).numpy() * 127.5 + 127.5)
    assert abs(across - 32) <= 1
    assert abs(down - 32) <= 1


@pytest.mark.parametrize(
    ("width", "height", "bucket"), [pytest.param(3840, 2160, "7x240x432", marks=pytest.mark.slow), (1080, 1920, "7x432x240")]
)
def test_large_and_upright_footage_takes_its_bucket_round(tmp_path, width, height, bucket):
    info = probe(make_disc(tmp_path / "a.mp4", width, height, H264))
    source = ClipSource(info.path, "disc")
    chosen = choose_bucket(info, source, [Bucket(7, 240, 432), Bucket(7, 432, 240)], upscale=False)
    assert str(chosen) == bucket
    across, down = _diameters(read_clip(source, info, chosen)[:, 3].permute(1, 2, 0).numpy() * 127.5 + 127.5)
    assert abs(across - down) <= 2


@pytest.mark.parametrize("turn", ["0", "90", "-90"])
def test_a_crop_is_cut_from_the_picture_as_shown(tmp_path, turn):
    """Pixels 4/3 wide, then turned: of the upright picture the crop keeps the square around the disc."""
    make_disc(tmp_path / "a.mp4", 180, 120, (*H264, "-vf", "setsar=4/3"), stretch=3 / 4)
    run_ffmpeg("-display_rotation", turn, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mov")
    info = probe(tmp_path / "b.mov")
    middle = info.width // 2, info.height // 2
    box = (middle[0] - 30, middle[1] - 30, middle[0] + 30, middle[1] + 30)
    clip = read_clip(ClipSource(info.path, "disc", crop=box), info, Bucket(7, 64, 64))
    inside = _diameters(clip[:, 3].permute(1, 2, 0).numpy() * 127.5 + 127.5)
    assert min(inside) >= 62  # it fills the crop
    corners = clip[0, 3, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners < -0.9).all()


def test_a_crop_is_exact_to_the_pixel(tmp_path):
    clip = make_clip(tmp_path / "a.mp4")
    info = probe(clip)
    whole = read_clip(ClipSource(clip, "numbers"), info, BUCKET)
    part = read_clip(ClipSource(clip, "numbers", crop=(16, 16, 112, 48)), info, Bucket(37, 32, 96))
    assert torch.equal(part, whole[:, :, 16:48, 16:112])


def test_a_crop_of_an_image(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    info = probe(tmp_path / "a.png")
    clip = read_clip(ClipSource(info.path, "noise", crop=(32, 16, 64, 48)), info, Bucket(1, 32, 32))
    expected = torch.from_numpy(pixels[16:48, 32:64]).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(clip[:, 0], expected)


@pytest.mark.parametrize("crop", [(0, 0, 129, 64), (-1, 0, 64, 64), (64, 0, 64, 64), (0, 40, 64, 30)])
def test_a_crop_outside_the_picture_is_refused_by_name(tmp_path, crop):
    clip = make_clip(tmp_path / "a.mp4", frames=8)
    with pytest.raises(ClipError, match=r"a\.mp4: crop \[.*\] does not lie inside the picture of 128x64 pixels as shown"):
        read_clip(ClipSource(clip, "numbers", crop=crop), probe(clip), Bucket(7, 64, 128))


def test_a_thumbnail_is_the_same_picture_smaller(tmp_path):
    """HDR too: light is measured after tone mapping, not before."""
    signals = np.repeat(pq_signal(np.array([[5.0], [50.0], [203.0]])), 3, 1)
    info = probe(make_patches(tmp_path / "a.mp4", signals, hdr("smpte2084")))
    with open_video(info.path) as (container, stream):
        frame = next(iter(progressive(info, stream, container.decode(stream))))
        convert = VideoReformatter()
        small, whole = as_shown(info, frame, convert, size=(24, 8)), as_shown(info, frame, convert)
    assert small.shape == (8, 24, 3)
    assert whole.shape == (64, 192, 3)
    assert np.abs(small[4, [4, 12, 20]].astype(int) - whole[32, [32, 96, 160]]).max() <= 2


def test_a_size_that_changes_inside_a_file_is_refused(tmp_path):
    for name, size in (("a.ts", "128x64"), ("b.ts", "96x64")):
        run_ffmpeg("-f", "lavfi", "-i", f"testsrc=s={size}:r=30:d=1", *H264, tmp_path / name)
    (tmp_path / "list.txt").write_text("file a.ts\nfile b.ts\n")
    joined = tmp_path / "c.ts"
    run_ffmpeg("-f", "concat", "-i", tmp_path / "list.txt", "-c", "copy", joined)
    with pytest.raises(ClipError, match=r"c\.ts: the picture size changes to 96x64; cut it"):
        read_clip(ClipSource(joined, "test"), probe(joined), BUCKET)
