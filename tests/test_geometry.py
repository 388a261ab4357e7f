"""Frames by time stamp, bucket by shape and length, crop without distortion."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mochi_lora.data.geometry import choose_bucket, crop_plan, frame_times, nearest_frames, resize_and_crop, shown_size
from mochi_lora.data.probe import ClipInfo
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError
from mochi_lora.spec import Bucket

RATES = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(50), Fraction(60), Fraction(12)]


def _exact(rate: Fraction, count: int, frames: int) -> list[int]:
    """By definition, in rational numbers: nearest in time, ties to the earlier."""
    return [min(range(count), key=lambda i: (abs(i / rate - Fraction(k, 30)), i)) for k in range(frames)]


def _times(rate: Fraction, count: int, tick: float = 0.0) -> list[float]:
    exact = [float(i / rate) for i in range(count)]
    return [round(time / tick) * tick for time in exact] if tick else exact


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_constant_rates_give_the_nearest_frames(rate):
    count = math.ceil(rate * 2)
    assert nearest_frames(_times(rate, count), float(1 / rate), 37) == _exact(rate, count, 37)


def test_a_familiar_case_by_hand():
    """25 fps: the instant 0.1 s lies midway between frames 2 and 3 and takes the earlier."""
    assert nearest_frames(_times(Fraction(25), 50), 0.04, 7) == [0, 1, 2, 2, 3, 4, 5]


def test_millisecond_clocks_choose_the_same_frames():
    """Matroska rounds stamps to 1 ms; at 30 fps in, 30 fps out, nothing may be repeated or lost."""
    assert nearest_frames(_times(Fraction(30), 37, tick=0.001), 0.033, 37) == list(range(37))


def test_uneven_stamps_are_followed():
    times = [0.0, 0.02, 0.3, 0.31, 0.5]
    assert nearest_frames(times, 0.02, 13) == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    with pytest.raises(ClipError, match="legal shorter counts: 13, 7, 1"):
        nearest_frames(times, 0.02, 19)


def test_a_range_never_shows_frames_outside_it():
    times = _times(Fraction(25), 100)
    chosen = nearest_frames(times, 0.04, 31, start=1.01, end=2.05)
    assert chosen[0] == 26  # 1.00 is nearer than 1.04 but lies before the cut
    assert chosen[-1] <= 51
    with pytest.raises(ClipError, match=r"too short: has 0\.960 s, 31 frames"):
        nearest_frames(times, 0.04, 31, start=1.0, end=1.95)
    with pytest.raises(ClipError, match=r"has 0\.000 s.*legal shorter counts: none"):
        nearest_frames(times, 0.04, 7, start=9.0)


@pytest.mark.parametrize(("rate", "enough"), [(30, 37), (24, 30), (60, 73), (25, 31)])
def test_the_last_instant_needs_a_frame_within_half_an_interval(rate, enough):
    nearest_frames(_times(Fraction(rate), enough), 1 / rate, 37)
    with pytest.raises(ClipError, match=r"clip too short: .*legal shorter counts: 31, 25, 19, 13, 7, 1"):
        nearest_frames(_times(Fraction(rate), enough - 1), 1 / rate, 37)


def test_frame_times_are_thirtieths():
    assert frame_times(4) == (0.0, 1 / 30, 2 / 30, 3 / 30)


def _info(width: int, height: int, frames: int = 60) -> ClipInfo:
    times = tuple(_times(Fraction(30), frames))
    return ClipInfo(Path("a.mp4"), width, height, 0, times, 1 / 30, is_image=False)


SOURCE = ClipSource(Path("a.mp4"), "a clip")
BUCKETS = [Bucket.parse(text) for text in ("37x480x848", "61x480x848", "37x848x480", "37x480x480", "31x240x432")]


@pytest.mark.parametrize(
    ("width", "height", "frames", "bucket"),
    [
        (1920, 1080, 90, "61x480x848"),
        (1920, 1080, 60, "37x480x848"),
        (1920, 1080, 33, "31x240x432"),
        (1080, 1920, 60, "37x848x480"),
        (700, 640, 60, "37x480x480"),
        (640, 360, 60, "31x240x432"),
    ],
)
def test_a_clip_takes_the_nearest_aspect_then_the_most_frames_that_fit(width, height, frames, bucket):
    assert str(choose_bucket(_info(width, height, frames), SOURCE, BUCKETS, upscale=False)) == bucket


def test_aspect_distance_is_symmetric_in_width_and_height():
    """By ratio 1.1 lies nearer to 0.5 than to 2, by its logarithm nearer to 2."""
    wide, tall = Bucket(7, 32, 64), Bucket(7, 64, 32)
    assert choose_bucket(_info(220, 200), SOURCE, [tall, wide], upscale=False) == wide
    assert choose_bucket(_info(200, 220), SOURCE, [tall, wide], upscale=False) == tall


def test_too_short_for_every_bucket_of_the_aspect_names_the_clip_and_the_need():
    with pytest.raises(
        ClipError, match=r"a\.mp4: clip too short: has 0\.667 s, 31 frames at 30 fps need 1\.017 s; .* 19, 13, 7, 1"
    ):
        choose_bucket(_info(1920, 1080, 20), SOURCE, BUCKETS, upscale=True)


def test_a_small_clip_is_refused_unless_upscaling_is_asked_for():
    with pytest.raises(ClipError, match=r"320x180 pixels .* 432x240 .*set data\.upscale: true"):
        choose_bucket(_info(320, 180), SOURCE, BUCKETS, upscale=False)
    assert str(choose_bucket(_info(320, 180), SOURCE, BUCKETS, upscale=True)) == "37x480x848"


def test_an_image_takes_one_frame_of_the_nearest_shape():
    image = replace(_info(1000, 1000), times=(0.0,), frame_seconds=0.0, is_image=True)
    assert str(choose_bucket(image, SOURCE, BUCKETS, upscale=False)) == "1x480x480"
    singles = [*BUCKETS, Bucket(1, 480, 848)]
    assert str(choose_bucket(image, SOURCE, singles, upscale=False)) == "1x480x848"


def test_a_crop_counts_as_the_whole_picture():
    """Letterbox bars cut off: what is left is wider; too little left is refused by its own size."""
    square = replace(SOURCE, crop=(420, 0, 1500, 1080))
    assert shown_size(_info(1920, 1080), square) == (1080, 1080)
    assert str(choose_bucket(_info(1920, 1080), square, BUCKETS, upscale=False)) == "37x480x480"
    with pytest.raises(ClipError, match=r"a\.mp4: 100x100 pixels are fewer"):
        choose_bucket(_info(1920, 1080), replace(SOURCE, crop=(0, 0, 100, 100)), BUCKETS, upscale=False)
    with pytest.raises(ClipError, match=r"crop \[0, 0, 1921, 1080\] does not lie inside the picture of 1920x1080"):
        choose_bucket(_info(1920, 1080), replace(SOURCE, crop=(0, 0, 1921, 1080)), BUCKETS, upscale=False)


def test_the_crop_plan_covers_the_bucket_and_centres():
    assert crop_plan(1920, 1080, Bucket(1, 480, 848)) == (853, 480, 2, 0)
    assert crop_plan(1080, 1920, Bucket(1, 480, 848)) == (848, 1508, 0, 514)
    assert crop_plan(848, 480, Bucket(1, 480, 848)) == (848, 480, 0, 0)


def test_the_same_size_passes_through_exactly():
    frames = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = resize_and_crop(frames, 32, 48)
    assert out.shape == (3, 2, 32, 48)
    assert out.dtype == torch.float32
    assert torch.equal(out, frames.permute(3, 0, 1, 2).float() / 127.5 - 1)


def test_black_and_white_are_minus_one_and_one():
    for value, expected in ((0, -1.0), (255, 1.0)):
        out = resize_and_crop(torch.full((1, 32, 48, 3), value, dtype=torch.uint8), 16, 16)
        torch.testing.assert_close(out, torch.full_like(out, expected), atol=1e-6, rtol=0)


def test_a_crop_is_taken_from_the_centre():
    """A ramp over the width, cropped: left and right ends are cut alike."""
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 64, 1).expand(1, 32, 64, 3).contiguous()
    row = (resize_and_crop(ramp, 32, 32)[0, 0, 0] + 1) * 127.5
    torch.testing.assert_close(row, torch.arange(16, 48).float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 112), (112, 64), (240, 432)])
def test_a_circle_stays_a_circle(height, width):
    y, x = torch.meshgrid(torch.arange(180) - 89.5, torch.arange(320) - 159.5, indexing="ij")
    disc = ((x**2 + y**2 < 60**2) * 255).to(torch.uint8).view(1, 180, 320, 1).expand(1, 180, 320, 3).contiguous()
    inside = resize_and_crop(disc, height, width)[0, 0] > 0
    across, down = int(inside.any(0).sum()), int(inside.any(1).sum())
    expected = min(120 * max(height / 180, width / 320), width)
    assert abs(down - 120 * max(height / 180, width / 320)) <= 2
    assert abs(across - expected) <= 2


def test_downscaling_is_antialiased():
    """Pixel-wide stripes become grey; at a third of the size, point sampling hits a pixel's centre each time."""
    stripes = ((torch.arange(96) % 2) * 255).to(torch.uint8).view(1, 1, 96, 1).expand(1, 96, 96, 3).contiguous()
    middle = resize_and_crop(stripes, 32, 32)[:, :, 8:24, 8:24]
    assert middle.abs().max() < 0.2


def test_upscaling_overshoot_is_clamped():
    edge = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    edge[:, :, 8:] = 255
    out = resize_and_crop(edge, 64, 64)
    assert out.min() == -1
    assert out.max() == 1
