"""Every suffix that counts as a video is one we can read: all times, any frame, a survey; half a file is found out."""

from pathlib import Path

import pytest
from footage import H264, halved, make_clip, read_numbers

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.survey import survey_source
from mochi_lora.data.decode import read_clip
from mochi_lora.data.media import VIDEO_SUFFIXES
from mochi_lora.data.probe import probe
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import Bucket

MPEG2 = ("-c:v", "mpeg2video", "-b:v", "4M", "-bf", "2")
AVCHD = ("-f", "mpegts", "-mpegts_m2ts_mode", "1", *H264)
CODECS = {
    ".mts": AVCHD,
    ".m2ts": AVCHD,
    ".wmv": ("-c:v", "wmv2", "-b:v", "2M"),
    ".asf": ("-c:v", "msmpeg4", "-b:v", "2M"),
    ".flv": H264,
    ".f4v": H264,
    ".3gp": H264,
    ".3g2": ("-c:v", "mpeg4", "-b:v", "2M"),
    ".mxf": (*MPEG2, "-pix_fmt", "yuv422p"),
}


@pytest.mark.parametrize("suffix", CODECS)
def test_the_container_of_each_suffix_is_read_to_the_frame(tmp_path, suffix):
    assert suffix in VIDEO_SUFFIXES
    path = make_clip(tmp_path / f"a{suffix}", codec=CODECS[suffix])
    info = probe(path)
    assert list(info.times) == pytest.approx([index / 30 for index in range(48)], abs=2e-3)
    clip = read_clip(ClipSource(path, "a clip", start=20 / 30), info, Bucket(25, 64, 128))
    assert read_numbers(clip) == list(range(20, 45))
    assert len(survey_source(info, SplitConfig(), lambda frames: None).times) == 48


@pytest.mark.parametrize("suffix", CODECS)
def test_half_of_it_is_refused(tmp_path, suffix):
    half = halved(make_clip(tmp_path / f"a{suffix}", codec=CODECS[suffix]), Path(tmp_path / f"half{suffix}"))
    with pytest.raises(ClipError, match=r"half\.\w+: .*(truncated|cannot be read)"):
        probe(half)


def test_suffixes_are_lower_case_and_begin_with_a_dot():
    assert all(suffix == suffix.lower() and suffix.startswith(".") and suffix.count(".") == 1 for suffix in VIDEO_SUFFIXES)
