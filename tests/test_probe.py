"""What a file holds, and every kind that is refused by name."""

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from footage import H264, absurd, halved, hdr, make_clip, numbered_frame, run_ffmpeg
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from mochi_lora.data.colour_tags import light_of
from mochi_lora.data.probe import probe, read_image, unreadable_named
from mochi_lora.data.tone_map import Light
from mochi_lora.errors import ClipError

VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "400k")
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2")
M2TS = (*H264, "-f", "mpegts", "-mpegts_m2ts_mode", "1")
THEORA = ("-c:v", "libtheora", "-q:v", "7")
FASTSTART = (*H264, "-movflags", "+faststart")


def _x264(parameters: str) -> tuple[str, ...]:
    return (*H264, "-x264-params", parameters)


@pytest.mark.parametrize(
    ("name", "codec", "marked"),
    [
        ("a.mp4", H264, False),
        ("a.mov", H264, False),
        ("a.mkv", H264, False),
        ("a.webm", VP9, False),
        ("a.avi", ("-c:v", "mpeg4", "-q:v", "2"), True),
        ("a.gif", (), False),
        ("a.mpg", MPEG2, True),
        ("a.ts", H264, True),
        ("a.vob", (*MPEG2, "-f", "vob"), True),
        ("a.m2ts", M2TS, True),
        ("a.ogv", THEORA, True),
    ],
)
def test_every_container_gives_all_its_time_stamps(tmp_path, name, codec, marked):
    info = probe(make_clip(tmp_path / name, frames=26, rate="25", codec=codec))
    assert (info.width, info.height, info.rotation, info.is_image, info.seekable) == (128, 64, 0, False, True)
    assert len(set(info.marks)) == (26 if marked else 0)  # each frame looks different
    np.testing.assert_allclose(info.times, np.arange(26) / 25, atol=1e-3)
    assert info.times[0] == 0.0
    assert info.frame_seconds == pytest.approx(0.04)
    assert info.duration == pytest.approx(26 / 25, abs=2e-3)


def test_an_mpeg_stream_under_another_name_is_found_out(tmp_path):
    clip = make_clip(tmp_path / "a.ts")
    assert probe(clip.rename(tmp_path / "a.mp4")).marks


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path):
    make_clip(tmp_path / "whole.mp4", frames=60, rate="25")
    run_ffmpeg("-ss", "0.8", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "cut.mp4")  # 0.8 s is no key frame
    assert len(probe(tmp_path / "cut.mp4").times) == 40


@pytest.mark.parametrize(("turn", "rotation", "size"), [(90, 90, (64, 128)), (180, 180, (128, 64)), (-90, 270, (64, 128))])
def test_size_is_given_as_shown(tmp_path, turn, rotation, size):
    make_clip(tmp_path / "a.mp4", frames=8)
    run_ffmpeg("-display_rotation", str(turn), "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mov")
    info = probe(tmp_path / "b.mov")
    assert (info.rotation, (info.width, info.height)) == (rotation, size)


def test_images_have_one_frame_and_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(numbered_frame(1)).save(tmp_path / "a.jpg", exif=exif)
    info = probe(tmp_path / "a.jpg")
    assert (info.width, info.height, info.times, info.is_image, info.duration) == (64, 128, (0.0,), True, 0.0)


def _with_exif(path, exif):
    Image.fromarray(numbered_frame(1)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_every_orientation_is_applied(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _with_exif(tmp_path / name, exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(read_image(path), expected)
    assert expected.shape[:2] == ((64, 128) if orientation < 5 else (128, 64))


def _tags(*tags):
    """EXIF of these (tag, type, count, value), its entries as they are."""
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4)


TURNED = (0x0112, 3, 1, 6)
ODD_TAGS = {  # of a type that the standard does not give them
    "a maker that is a fraction": (0x010F, 5, 1, 8),
    "a resolution that is a text": (0x011A, 2, 4, 0x20202020),
    "a unit beyond its range": (0x0128, 4, 1, 100_000),
    "fields beyond the end": (0x8769, 4, 1, 100_000),
}


@pytest.mark.parametrize("odd", ODD_TAGS.values(), ids=ODD_TAGS)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_odd_exif_takes_no_picture_whose_pixels_and_orientation_are_whole(tmp_path, name, odd):
    info = probe(_with_exif(tmp_path / name, _tags(*sorted((TURNED, odd)))))
    assert (info.width, info.height) == (64, 128)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0II", b"Exif\0\0II+\0\x08\0\0\0", b"Exif\0\0nothing at all"])
def test_a_picture_whose_exif_cannot_be_read_is_shown_as_stored(tmp_path, name, exif):
    info = probe(_with_exif(tmp_path / name, exif))
    assert (info.width, info.height) == (128, 64)


@pytest.mark.parametrize("key", ["exif", "xmp", "Raw profile type exif"])
def test_a_text_in_a_png_that_is_called_as_exif_is_takes_no_picture(tmp_path, key):
    texts = PngInfo()
    texts.add_text(key, "\n\n\nno tags at all")
    Image.fromarray(numbered_frame(1)).save(tmp_path / "a.png", pnginfo=texts)
    assert np.array_equal(read_image(tmp_path / "a.png"), numbered_frame(1))


@pytest.mark.parametrize(
    ("codec", "light"),
    [
        (_x264("transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"), Light("PQ", "BT.2020")),
        (_x264("transfer=smpte2084"), Light("PQ", "BT.2020")),  # the primaries that HDR nearly always has
        (_x264("transfer=smpte2084:colorprim=smpte432"), Light("PQ", "P3")),
        (_x264("transfer=arib-std-b67:colorprim=bt2020"), Light("HLG", "BT.2020")),
        (_x264("transfer=bt709:colorprim=bt2020:colormatrix=bt2020nc"), Light("SDR", "BT.2020")),
        (_x264("transfer=bt709:colorprim=smpte432"), Light("SDR", "P3")),
        (_x264("transfer=bt709:colorprim=bt709:colormatrix=bt709"), None),
        (_x264("transfer=smpte170m:colorprim=smpte170m:colormatrix=smpte170m"), None),
        (H264, None),
    ],
)
def test_what_code_values_mean_is_read_from_the_tags(tmp_path, codec, light):
    info = probe(make_clip(tmp_path / "a.mp4", frames=8, codec=codec))
    assert info.light == light


@pytest.mark.parametrize(("transfer", "reason"), [(2, "colours coded as Dolby Vision alone"), (18, None)])
def test_dolby_vision_is_read_by_the_picture_inside_it_or_refused(transfer, reason):
    """Made by hand: no encoder here writes it. Phones put HLG inside; profile 5 puts nothing that others can read."""
    tags = SimpleNamespace(color_trc=transfer, color_primaries=2, colorspace=2, side_data={"DOVI_METADATA": b""})
    stream = SimpleNamespace(codec_context=tags)
    if reason is None:
        assert light_of(Path("a.mov"), stream, tags) == Light("HLG", "BT.2020")
    else:
        with pytest.raises(ClipError, match=rf"a\.mov: {reason}"):
            light_of(Path("a.mov"), stream, tags)


@pytest.mark.parametrize(
    ("said", "peak"),
    [
        ("max-cll=4000,400", 4000.0),
        ("master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(20000000,1)", 2000.0),
        ("master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(20000000,1):max-cll=600,400", 600.0),
        ("hdr10=1", 1000.0),
    ],
)
def test_the_brightest_light_is_read_from_the_metadata(tmp_path, said, peak):
    assert probe(make_clip(tmp_path / "a.mp4", frames=4, codec=hdr("smpte2084", said))).light.peak == peak


@pytest.mark.parametrize(
    ("codec", "reason"),
    [
        (_x264("transfer=linear"), "colours coded as linear light"),
        (_x264("transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020c"), "colours coded as BT.2020 constant luminance"),
        (_x264("transfer=smpte2084:colorprim=bt2020:colormatrix=ictcp"), "colours coded as ICtCp"),
        (_x264("colormatrix=ycgco"), "colours coded as YCgCo"),
        ((*H264, "-vf", "setsar=40/3"), "pixels of 40/3 width to height, a damaged tag"),
        (("-vf", "setfield=tff", "-c:v", "mjpeg"), "its container says interlaced, its pictures do not say how"),
    ],
)
def test_material_that_would_be_read_wrongly_is_refused_by_name(tmp_path, codec, reason):
    with pytest.raises(ClipError, match=rf"a\.mp4: {reason}"):
        probe(make_clip(tmp_path / "a.mp4", frames=8, codec=codec))


def test_the_rounding_of_scalers_does_not_make_a_clip_anamorphic(tmp_path):
    assert probe(make_clip(tmp_path / "a.mp4", frames=8, codec=(*H264, "-vf", "setsar=640/639"))).width == 128


def test_a_mirrored_clip_is_refused(tmp_path):
    make_clip(tmp_path / "a.mp4", frames=8)
    run_ffmpeg("-display_hflip", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mov")
    with pytest.raises(ClipError, match="shown mirrored"):
        probe(tmp_path / "b.mov")


@pytest.mark.parametrize(
    ("aspect", "turn", "size", "stored"),
    [
        ("4/3", 0, (171, 64), (128, 64)),
        ("8/9", 0, (128, 72), (128, 64)),
        ("4/3", 90, (64, 171), (128, 64)),
        ("1/1", 90, (64, 128), None),
    ],
)
def test_anamorphic_size_is_that_of_square_pixels(tmp_path, aspect, turn, size, stored):
    make_clip(tmp_path / "a.mp4", frames=8, codec=(*H264, "-vf", f"setsar={aspect}"))
    run_ffmpeg("-display_rotation", str(turn), "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mov")
    info = probe(tmp_path / "b.mov")
    assert (info.width, info.height) == size
    assert info.stored == stored


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_interlaced_material_is_known(tmp_path, name):
    info = probe(make_clip(tmp_path / name, frames=26, rate="25", codec=_x264("tff=1")))
    assert info.interlaced
    np.testing.assert_allclose(info.times, np.arange(26) / 25, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "codec", "reason"),
    [
        ("a.mp4", FASTSTART, "the file is truncated"),
        ("a.mp4", H264, "the file is truncated|cannot be read"),
        ("a.mkv", H264, "the file is truncated"),
        ("a.webm", VP9, "the file is truncated"),
        ("a.avi", ("-c:v", "mpeg4"), "the file is truncated"),
        ("a.gif", (), "the file is truncated"),
        ("a.ts", H264, "the file is truncated"),
        ("a.m2ts", M2TS, "the file is truncated"),
        ("a.mpg", MPEG2, "the file is truncated"),
        ("a.vob", (*MPEG2, "-f", "vob"), "the file is truncated"),
        ("a.ogv", THEORA, "the file is truncated"),
    ],
)
def test_half_a_file_is_refused_by_name(tmp_path, name, codec, reason):
    half = halved(make_clip(tmp_path / name, codec=codec), tmp_path / f"half{Path(name).suffix}")
    with pytest.raises(ClipError, match=rf"half\.\w+: .*({reason})"):
        probe(half)


def test_a_transport_stream_cut_inside_a_picture_is_refused(tmp_path):
    """Cut between packets, which no length gives away: the decoder marks the half picture."""
    whole = make_clip(tmp_path / "a.ts", codec=("-vf", "noise=alls=60:allf=t", *H264))
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2 // 188 * 188])
    with pytest.raises(ClipError, match=r"a\.ts: frame \d+ is damaged, as in a truncated file"):
        probe(whole)


def test_one_missing_byte_is_noticed(tmp_path):
    whole = make_clip(tmp_path / "a.mkv")
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ClipError, match="truncated"):
        probe(whole)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.mp4", b"", "the file is empty"),
        ("a.mp4", b"just some text, renamed\n" * 50, "cannot be read as video or image"),
        ("a.mkv", bytes(range(256)) * 64, "cannot be read as video or image"),
        ("a.png", b"no picture", "cannot be read as video or image"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipError, match=rf"{name}: {reason}"):
        probe(tmp_path / name)
    with pytest.raises(ClipError, match="no such file"):
        probe(tmp_path / "nowhere.mp4")


def test_a_header_that_asks_for_absurd_memory_is_this_files_failure(tmp_path):
    """FFmpeg answers ENOMEM, of which PyAV makes an error that is a MemoryError as well; ours passes."""
    whole = make_clip(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(absurd(whole.read_bytes()))
    with pytest.raises(ClipError, match=r"b\.mp4: cannot be read .*[Cc]annot allocate memory"):
        probe(tmp_path / "b.mp4")
    with pytest.raises(MemoryError), unreadable_named(whole):
        raise MemoryError


def test_sound_without_pictures_is_refused(tmp_path):
    run_ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "a.mp4")
    with pytest.raises(ClipError, match="holds no video, only audio"):
        probe(tmp_path / "a.mp4")


def test_a_truncated_image_and_a_16_bit_one_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(ClipError, match=r"half\.jpg: cannot be read .*truncated"):
        probe(halved(tmp_path / "a.jpg", tmp_path / "half.jpg"))
    Image.fromarray(rng.integers(0, 65536, (64, 64), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ClipError, match=r"deep\.png: more than 8 bits per channel"):
        probe(tmp_path / "deep.png")


def test_time_stamps_out_of_order_are_refused(tmp_path):
    """AVI stores no presentation times; with B-frames FFmpeg's guesses run backwards."""
    clip = make_clip(tmp_path / "a.avi", codec=H264)
    with pytest.raises(ClipError, match=r"a\.avi: its time stamps are missing or out of order; convert it"):
        probe(clip)
