"""Clips out of a shot: legal length, inside the shot, where the mode says."""

import random

import pytest

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.ranges import clip_ranges, usable_part
from mochi_lora.data.geometry import nearest_frames
from mochi_lora.spec import FRAMES_PER_SECOND


def split(mode: str, **changes) -> SplitConfig:
    return SplitConfig(**{"mode": mode, "frames": 37, **changes})


def shot(seconds: float, rate: float = 30.0, start: float = 0.0, margin: float = 0.0):
    times = [start + index / rate for index in range(round(seconds * rate))]
    return usable_part(times, start + len(times) / rate, 1 / rate, margin)


def starts(part, settings: SplitConfig) -> list[float]:
    return [clip.start for clip in clip_ranges(part, settings)]


def test_each_mode_takes_the_clips_it_says():
    part = shot(5.0)  # 150 frames: starts 0 to 113
    assert starts(part, split("head")) == [0.0]
    assert starts(part, split("middle")) == [round(57 / 30, 6)] or starts(part, split("middle")) == [round(56 / 30, 6)]
    assert starts(part, split("chunk")) == [round(37 * k / 30, 6) for k in range(4)]
    assert starts(part, split("slide", stride=30)) == [0.0, 1.0, 2.0, 3.0]
    assert starts(part, split("uniform", count=3)) == [0.0, pytest.approx(56.5 / 30, abs=0.5 / 30 + 1e-6), round(113 / 30, 6)]
    assert starts(part, split("uniform", count=1)) == starts(part, split("middle"))


def test_a_shot_one_frame_too_short_gives_nothing_and_one_that_just_fits_gives_itself():
    for mode in ("head", "middle", "chunk", "slide", "uniform"):
        assert clip_ranges(shot(36 / 30), split(mode)) == []
        (clip,) = clip_ranges(shot(37 / 30), split(mode))
        assert (clip.start, clip.end) == (0.0, round(37 / 30, 6))


def test_no_mode_takes_a_range_twice():
    assert len(clip_ranges(shot(38 / 30), split("uniform", count=9))) == 2


def test_the_margin_is_left_out_on_both_sides():
    part = shot(5.0, start=10.0, margin=0.2)
    assert part.times[0] == pytest.approx(10.2)
    assert part.times[-1] == pytest.approx(14.8 - 1 / 30)
    assert shot(0.3, margin=0.2).times == []
    assert usable_part([], 0.0, 0.04, 0.1).times == ()


def test_a_shot_of_slow_footage_lends_its_frame_after_the_last_instant():
    """10 frames per second, 7 frames at 30: the last instant, 0.2 s, is the third source frame."""
    (clip,) = clip_ranges(shot(0.3, rate=10), split("head", frames=7))
    assert nearest_frames([0.0, 0.1, 0.2, 0.3], 0.1, 7, clip.start, clip.end) == [0, 0, 1, 1, 1, 2, 2]


def uneven(chance: random.Random, seconds: float) -> list[float]:
    times, now = [], chance.uniform(0, 5)
    until = now + seconds
    while now < until:
        times.append(now)
        now += chance.uniform(0.005, 0.09)
    return times


@pytest.mark.parametrize("mode", ["head", "middle", "chunk", "slide", "uniform"])
@pytest.mark.parametrize("rate", [10, 12.5, 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60, 120, 0])
def test_every_range_decodes_to_its_frames_from_inside_its_shot(mode, rate):
    """Against `nearest_frames` on the whole source, for shots anywhere in it; rate 0 is uneven footage."""
    chance, made = random.Random(f"{mode}{rate}"), 0  # noqa: S311
    for _ in range(30):
        times = uneven(chance, 12) if rate == 0 else [index / rate for index in range(round(12 * rate))]
        frame_seconds = 0.04 if rate == 0 else 1 / rate
        first = chance.randrange(len(times) // 2)
        stop = chance.randrange(first + 1, len(times))
        margin = chance.choice([0.0, 0.0, 0.1, 0.35])
        part = usable_part(times[first:stop], times[stop], frame_seconds, margin)
        frames = chance.choice([1, 7, 19, 37, 85])
        clips = clip_ranges(part, split(mode, frames=frames, stride=chance.randint(1, 60), count=chance.randint(1, 6)))
        made += len(clips)
        for clip in clips:
            chosen = nearest_frames(times, frame_seconds, frames, clip.start, clip.end)
            assert first <= chosen[0] <= chosen[-1] < stop
            assert times[chosen[0]] == pytest.approx(clip.start, abs=1e-6)
            assert times[chosen[0]] >= times[first] + margin - 1e-5
            assert times[chosen[-1]] <= times[stop] - margin + 1e-5
            assert clip.end <= times[stop] - margin + 1e-5
            assert clip.end - clip.start <= (frames + 1) / FRAMES_PER_SECOND + 2 * max(frame_seconds, 0.1)
        assert clips == sorted(clips, key=lambda clip: clip.start)
        if mode in ("chunk", "head", "middle"):
            ends = [clip.end for clip in clips[:-1]]
            assert all(end <= clip.start + 1e-5 for end, clip in zip(ends, clips[1:], strict=True))
    assert made > 10


def test_chunks_leave_less_than_a_clip_at_the_end():
    for rate in (24, 25, 30, 50):
        part = shot(20.0, rate=rate)
        clips = clip_ranges(part, split("chunk"))
        assert len(clips) >= 20.0 // (37 / 30 + 1 / rate)
        assert 20.0 - clips[-1].end < 37 / 30 + 1 / rate


def test_slides_begin_within_half_a_frame_of_every_stride():
    found = starts(shot(10.0, rate=24), split("slide", stride=15))
    assert len(found) == 18
    for place, start in enumerate(found):
        assert abs(start - place * 0.5) <= 0.5 / 24 + 1e-6
