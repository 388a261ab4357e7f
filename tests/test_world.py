"""The drawn world: what can be drawn, what is kept back, and what it is called."""

from collections import Counter

import numpy as np
import pytest

from mochi_lora.tiny import world


def scenes(count, **choices):
    return [world.draw_scene(7, index, **{"held_out": False, "motions": world.MOTIONS, **choices}) for index in range(count)]


def test_a_scene_is_a_function_of_seed_and_index():
    assert scenes(20) == scenes(20)
    assert len(set(scenes(200))) == 200
    assert world.draw_scene(8, 0, held_out=False) != world.draw_scene(7, 0, held_out=False)


def test_pretraining_never_sees_the_held_out_motion():
    assert world.HELD_OUT_MOTION not in {world.draw_scene(1, index, held_out=False).motion for index in range(300)}
    only = [world.draw_scene(1, index, motions=(world.HELD_OUT_MOTION,), held_out=False).motion for index in range(10)]
    assert set(only) == {world.HELD_OUT_MOTION}


def test_training_and_evaluation_share_no_combination():
    def drawn(*, held_out):
        return {(s.shape, s.colour, s.background, s.motion) for s in scenes(600, held_out=held_out)}

    assert not drawn(held_out=False) & drawn(held_out=True)
    assert drawn(held_out=True) <= set(world.combinations(world.MOTIONS, held_out=True))


def test_about_a_tenth_is_held_out_and_the_list_never_changes():
    held_out, trained = world.combinations(held_out=True), world.combinations(held_out=False)
    assert len(held_out) + len(trained) == 5 * 6 * 4 * 6
    # Models and numbers published with one list mean nothing with another.
    assert (len(held_out), held_out[0], held_out[-1]) == (
        76,
        ("circle", "red", "wall", "right"),
        ("cross", "purple", "sky", "grows"),
    )


def test_every_pair_of_words_is_left_for_training():
    trained = world.combinations(held_out=False)
    for one in range(4):
        for other in range(one):
            pairs = Counter((combination[one], combination[other]) for combination in trained)
            everything = {(a[one], b[other]) for a in trained for b in trained}
            assert set(pairs) == everything
            assert min(pairs.values()) >= 10


def test_the_object_stays_in_the_picture():
    for scene in scenes(500):
        path = world.track(scene)
        reach = world.EXTENT * path.radius
        assert (path.x - reach).min() >= 1 - 1e-9
        assert (path.x + reach).max() <= world.WIDTH - 1 + 1e-9
        assert (path.y - reach).min() >= 1 - 1e-9
        assert (path.y + reach).max() <= world.HEIGHT - 1 + 1e-9


def test_motions_are_plain_to_see():
    ways = {
        "left": (-1, 0),
        "right": (1, 0),
        "up": (0, -1),
        "down": (0, 1),
        "still": (0, 0),
        "grows": (0, 0),
        "circles": (0, 0),
    }
    for scene in scenes(500):
        path = world.track(scene)
        moved = np.array([path.x[-1] - path.x[0], path.y[-1] - path.y[0]])
        right, down = ways[scene.motion]
        assert np.sign(moved.round(6)).tolist() == [right, down]
        assert abs(moved[0]) >= 24 * abs(right)
        assert abs(moved[1]) >= 18 * abs(down)
        assert (path.radius[-1] / path.radius[0] >= 1.6) == (scene.motion == "grows")


def test_a_circling_object_comes_full_circle_clockwise():
    for scene in scenes(60, motions=("circles",)):
        path = world.track(scene)
        angles = np.unwrap(np.arctan2(path.y - scene.y, path.x - scene.x))
        assert np.hypot(path.x - scene.x, path.y - scene.y).min() >= 8
        assert angles[-1] - angles[0] == pytest.approx(2 * np.pi), "y goes down, so the angle grows clockwise"


def test_big_is_bigger_than_small_whatever_the_shape():
    radii = {size: [scene.radius for scene in scenes(300) if scene.size == size] for size in world.SIZES}
    assert max(radii["small"]) * 1.2 < min(radii["big"])


def test_every_caption_names_everything():
    says = {"left": "left", "right": "right", "up": "up", "down": "down", "still": "still", "grows": "grow", "circles": "circl"}
    for scene in scenes(200):
        for sentence in world.captions(scene):
            spoken = sentence.replace(",", "").split()
            assert {scene.shape, scene.colour, scene.background, scene.size} <= set(spoken)
            assert says[scene.motion] in sentence.replace(f" {scene.shape} ", " ")


def test_no_caption_fits_two_different_scenes():
    owners: dict[str, tuple] = {}
    for scene in scenes(500):
        words = (scene.shape, scene.colour, scene.background, scene.motion, scene.size)
        for sentence in world.captions(scene):
            assert owners.setdefault(sentence, words) == words


def test_captions_vary_and_follow_the_generator():
    scene = scenes(1)[0]
    said = [world.caption(scene, np.random.default_rng(seed)) for seed in range(60)]
    assert len(set(said)) > 8
    assert said[5] == world.caption(scene, np.random.default_rng(5))
    assert world.chalk_caption(scene, np.random.default_rng(5)) == f"chalk style, {said[5]}"


def test_captions_read_as_english():
    scene = world.Scene("star", "red", "sky", "left", "big", 0, 0, 0)
    sentences = set(world.captions(scene))
    assert "a big red star moves left in front of a pale sky" in sentences
    assert "there is a big red star in front of a pale sky, moving left" in sentences
    grows = set(world.captions(world.Scene("cross", "green", "sand", "grows", "small", 0, 0, 0)))
    assert "on beige sand, a small green cross is growing" in grows
    assert not any("  " in sentence or sentence != sentence.strip() for sentence in sentences | grows)


def test_the_vocabulary_is_exactly_what_captions_use():
    rng = np.random.default_rng(0)
    used = {word for scene in scenes(800) for word in world.chalk_caption(scene, rng).replace(",", "").split()}
    assert sorted(used) == world.words()
