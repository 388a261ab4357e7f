"""The judge against the truth: true renderings, worn ones, chalk, and clips that show nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny import world
from mochi_lora.tiny.judge import accuracy, judge
from mochi_lora.tiny.looks import LOOKS
from mochi_lora.tiny.render import render
from mochi_lora.tiny.style import style_score


def scenes(count, seed=11, motions=world.MOTIONS):
    return [world.draw_scene(seed, index, motions=motions, held_out=index % 2 == 0) for index in range(count)]


def rates(count, style, wear=lambda frames: frames):
    """Share of right answers per word."""
    answers = [accuracy(judge(wear(render(scene, style))), scene) for scene in scenes(count)]
    return {word: float(np.mean([answer[word] for answer in answers])) for word in answers[0]}


def worn(frames):
    """As a small autoencoder might return them: blurred (sigma 0.8), noisy (sd 6), compressed as JPEG."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 0.8**2))
    kernel /= kernel.sum()
    soft = frames.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(soft, [(3, 3) if a == axis else (0, 0) for a in range(4)], mode="edge")
        soft = sum(kernel[k] * padded.take(range(k, k + soft.shape[axis]), axis=axis) for k in range(7))
    noise = np.random.default_rng(int(frames.sum())).normal(0, 6, frames.shape)
    return np.stack([as_jpeg(frame) for frame in (soft + noise).round().clip(0, 255).astype(np.uint8)])


def as_jpeg(frame):
    packed = io.BytesIO()
    Image.fromarray(frame).save(packed, "JPEG", quality=60)
    return np.asarray(Image.open(packed))


def mixed(one, other, share):
    return ((1 - share) * one + share * other).round().astype(np.uint8)


def test_true_renderings_are_read_without_a_mistake():
    assert rates(20, "base") == dict.fromkeys(("colour", "shape", "motion", "background", "size"), 1.0)


def test_worn_renderings_are_read():
    assert min(rates(20, "base", worn).values()) >= 0.97


def test_chalk_is_read():
    assert min(rates(20, "chalk").values()) >= 0.97


@pytest.mark.slow
def test_a_hundred_of_each_are_read():
    assert min(rates(100, "base").values()) == 1.0
    assert min(rates(100, "base", worn).values()) >= 0.97
    assert min(rates(100, "chalk").values()) >= 0.97
    found = rates(100, "chalk", worn)
    assert min(found[word] for word in ("colour", "shape", "motion", "background")) >= 0.95


def test_centres_and_areas_are_the_objects():
    for scene in scenes(30):
        path, verdict = world.track(scene), judge(render(scene))
        assert np.abs(verdict.centres - np.stack([path.x, path.y], 1)).max() < 0.6
        assert np.ptp(np.sqrt(verdict.areas) / path.radius) < 0.12


def test_reversed_time_reverses_the_motion():
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for scene in scenes(12, motions=tuple(back)):
        assert judge(render(scene)[::-1]).motion == back[scene.motion]


def test_exchanged_channels_change_the_colour_and_nothing_else():
    scene = world.Scene("star", "red", "sky", "still", "big", 48.0, 32.0, 14.0)
    verdict = judge(np.ascontiguousarray(render(scene)[..., ::-1]))
    assert (verdict.colour, verdict.shape, verdict.motion, verdict.size) == ("blue", "star", "still", "big")


def test_an_object_seen_only_at_the_end_is_no_object():
    scene = scenes(1)[0]
    frames = render(scene)
    empty = np.stack([np.full_like(frames[0], 128)] * 25)
    empty[-5:] = frames[-5:]
    assert judge(empty).shape is None


@pytest.mark.parametrize("kind", ["black", "grey noise", "background alone"])
def test_a_clip_of_nothing_gets_no_words(kind):
    rng = np.random.default_rng(0)
    clips = {
        "black": np.zeros((25, 64, 96, 3), np.uint8),
        "grey noise": rng.integers(100, 140, (25, 64, 96, 1), dtype=np.uint8).repeat(3, axis=3),
        "background alone": worn(render(world.Scene("circle", "red", "sand", "still", "small", -50.0, 32.0, 9.0))),
    }
    verdict = judge(clips[kind])
    assert (verdict.colour, verdict.shape, verdict.motion, verdict.size) == (None, None, None, None)
    assert verdict.areas.sum() == 0
    assert np.isnan(verdict.centres).all()


def test_colour_noise_gets_an_answer_without_a_crash():
    judge(np.random.default_rng(0).integers(0, 256, (25, 64, 96, 3), dtype=np.uint8))


def test_other_sizes_are_refused():
    with pytest.raises(AssertionError, match="expected"):
        judge(np.zeros((25, 64, 64, 3), np.uint8))


# --- style --------------------------------------------------------------------------------------------------------------


def elsewhere(scene, index):
    """A scene of the same words, everything else drawn anew."""
    rng = stream(99, Purpose.WORLD, index)
    return world.place(rng, scene.shape, scene.colour, scene.background, scene.motion, scene.size)


def test_style_is_zero_for_base_and_one_for_chalk_wherever_the_object_is():
    scores = {"base": [], "chalk": [], "half": []}
    for index, scene in enumerate(scenes(30)):
        other = elsewhere(scene, index)
        base, chalk = render(other), render(other, "chalk")
        for name, frames in (("base", base), ("chalk", chalk), ("half", mixed(base, chalk, 0.5))):
            scores[name].append(style_score(frames, scene))
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    assert abs(means["base"]) < 0.05
    assert abs(means["chalk"] - 1) < 0.05
    assert 0.4 < means["half"] < 0.65
    assert max(scores["base"]) < min(scores["half"])
    assert max(scores["half"]) < min(scores["chalk"])


def test_style_grows_with_the_share_of_chalk():
    for scene in scenes(8):
        base, chalk = render(scene), render(scene, "chalk")
        scores = [style_score(mixed(base, chalk, share), scene) for share in (0, 0.25, 0.5, 0.75, 1)]
        assert scores[0] == pytest.approx(0, abs=1e-6)
        assert scores[-1] == pytest.approx(1, abs=1e-6)
        assert scores == sorted(scores)


def test_a_board_alone_is_not_the_style():
    for scene in scenes(20):
        base, chalk = render(scene).copy(), render(scene, "chalk")
        inside = np.ptp(base, axis=-1) > 100
        assert style_score(np.where(inside[..., None], base, chalk), scene) < 0.7


def test_no_look_that_mochi_tiny_knows_passes_for_chalk():
    """Neon and tapestry are dark and outlined as well: on the line from base to chalk they lie where chalk does."""
    means = {look.word: float(np.mean([style_score(render(scene, look), scene) for scene in scenes(16)])) for look in LOOKS}
    assert max(means.values()) < 0.63, "two thirds is what an adapter of the style must reach"


def test_a_style_without_a_name_is_not_chalk():
    with pytest.raises(AssertionError, match="expected one of"):
        render(scenes(1)[0], "neon")
